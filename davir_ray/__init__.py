"""DavIR: how learnable is each training example for a given language model? (arXiv 2310.13008)

    sources ─prepare─► examples ─finetune─► reference
                          │                     │
                          └──────score◄─────────┘        base and reference, same tokens
                                   │
                                 scores ─rank─► ranked ─select─► selected ─► report

    pairs ─prepare─► examples ─freeze─► frozen ─align─► policy ─score─► scores ─► margins ─► report      (align/)

Every arrow is a stage (stages/): it reads files with a schema, writes files with a schema into its own folders of the
run, and writes its manifest last. pipeline.py calls the stages in order. formulas/ has the paper's equations, run/
manages the folder of a run, engine/ has the Ray code that stages share, and models/ runs torch in one process.

For rows of Ray Data or `datasets` there are `davir_ray.score`, `davir_ray.rank` and `davir_ray.select` (api/). They are
imported on first use, so that code without Ray does not import it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from davir_ray.api import rank, score, select

__version__ = "0.2.0"

__all__ = ["__version__", "rank", "score", "select"]


def __getattr__(name: str) -> Any:
    if name.startswith("__") or name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("davir_ray.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
