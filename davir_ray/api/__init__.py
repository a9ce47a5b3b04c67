"""DavIR in a pipeline of Ray Data: score, rank, select.

    import davir_ray, ray
    rows = ray.data.read_json("instructions.jsonl")                                   # prompt, response
    scored = davir_ray.score(rows, base="org/model", reference="org/model-finetuned")
    best = davir_ray.select(davir_ray.rank(scored), top_fraction=0.06)
    best.write_parquet("best")

Given a dataset of Ray Data, the functions return one of Ray Data. Given a `datasets.Dataset`, they return a
`datasets.Dataset` with the same features; it is scored on Ray, and ranked and selected in this process.

`score` is lazy for Ray Data. `rank` executes the dataset, once, and keeps the rows with all their columns in Ray's
object store, which spills to disk; this process holds a few numbers for each 50,000 rows. A million rows of
instructions take a few GB; drop columns that you do not need, and for a corpus use the jobs (jobs/score.py), which work
on files and can be continued.

The scores are those of the jobs, by the same workers: nats, summed over the scored tokens, the end-of-sequence token
included. davir_ray/schema.py says what every column means.

If Ray has not been started, `score` starts it as the jobs do: it connects to RAY_ADDRESS or the submitted job's
cluster, else starts Ray on this machine. To use another cluster, call `ray.init` first. Ray is never shut down here.
The workers must be able to import davir_ray: install it on the cluster's nodes, or add it to the runtime environment.
"""

from davir_ray.api.ranking import rank
from davir_ray.api.scoring import score
from davir_ray.api.selection import select

__all__ = ["rank", "score", "select"]
