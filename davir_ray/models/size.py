"""The size of a model, from its configuration alone, for estimates before a run."""

from dataclasses import dataclass

from davir_ray.errors import ModelError
from davir_ray.models.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Counts of parameters, and the lengths that attention costs depend on."""

    num_parameters: int
    num_embedding: int
    """Parameters of the input embedding: looked up, not multiplied with."""
    num_head: int
    """Parameters of the output head: multiplied with at scored tokens only."""
    num_layers: int
    hidden: int
    linear_edges: int
    """Sum of inputs and outputs over all linear layers but the head: the parameters of a LoRA adapter of rank 1."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelSize":
        """The size of a checkpoint's model, without reading its weights. ModelError if it cannot be built."""
        from torch.nn import Linear

        model = checkpoint.skeleton()
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        text = model.config.get_text_config()
        return cls(
            num_parameters=model.num_parameters(),
            num_embedding=embedding.weight.numel(),
            num_head=0 if head is None else head.weight.numel(),
            num_layers=int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            linear_edges=sum(
                module.in_features + module.out_features
                for module in model.modules()
                if isinstance(module, Linear) and module is not head
            ),
        )

    @property
    def num_body(self) -> int:
        """Parameters that every token is multiplied with."""
        tied = self.num_parameters < self.num_embedding + self.num_head
        return self.num_parameters - self.num_embedding - (0 if tied else self.num_head)

    def forward_flops(self, num_tokens: float, num_scored: float, mean_length: float) -> float:
        """FLOPs of one forward pass over packed examples: linear layers, causal attention, head of scored tokens."""
        attention = 2 * self.num_layers * self.hidden * mean_length
        return num_tokens * (2 * self.num_body + attention) + num_scored * 2 * self.num_head


def num_ids(checkpoint: Checkpoint) -> int:
    """Number of token ids that both the embedding and the head have a row for; it may exceed the tokenizer's.

    The configuration determines it: weights of another shape are refused when they are loaded.
    """
    model = checkpoint.skeleton()
    try:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
    except NotImplementedError as error:
        raise ModelError(
            f"{checkpoint.uri} does not say which modules are its embeddings ({error}), which scoring needs"
        ) from error
    rows = [int(end.weight.shape[0]) for end in ends if hasattr(end, "weight")]
    if not rows:
        raise ModelError(f"{checkpoint.uri} has neither an embedding nor a head with weights, so it cannot be scored")
    return min(rows)
