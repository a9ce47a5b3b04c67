"""DavIR: how learnable is each training example for a given language model? (arXiv 2310.13008)

    sources ─prepare─► examples ─finetune─► reference
                          │                     │
                          └──────score◄─────────┘        base and reference, same tokens
                                   │
                                 scores ─rank─► ranked ─select─► selected ─► report

Every arrow is a stage (davir_ray/stages): it reads files with a schema, writes files with a schema into its own folder
of the run, and writes its manifest last. davir_ray/pipeline.py reads the chain aloud, davir_ray/formulas is the paper.
"""

__version__ = "0.1.0"
