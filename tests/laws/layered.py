"""A look-up table in layers: a model whose law is known exactly, whole and without some of its layers.

Layer i adds the scores of its own table, [token before last, last token], read back from its own cache. What it
keeps there says besides which layers had run before it, and a token that was fed past a layer left out is looked
up in another place of the table. So keys and values that a draft left where the target's should be change the law.
"""

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from specdec.layouts.facts import CACHE
from specdec.testing import TableConfig


class Layer(nn.Module):
    """Adds a table's scores to what it is given: (B, Q, 2 + V), token, layers that ran, scores."""

    def __init__(self, table, layer_idx):
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.layer_idx = layer_idx
        self.place = layer_idx  # its number in the whole model, which it keeps

    def forward(self, hidden, cache, columns):
        vocabulary = self.table.shape[-1]
        missing = self.place - hidden[..., 1:2]
        states = (hidden[..., :1] + vocabulary * missing)[:, None]
        keys = cache.update(states, states, self.layer_idx)[0][:, 0, :, 0].long()
        last, before = (keys.gather(1, at.clamp(min=0)) for at in (columns, columns - 1))
        before = torch.where(columns > 0, before, 0)
        shift = last // vocabulary + before // vocabulary
        scores = self.table[before % vocabulary, (last + shift) % vocabulary]
        return torch.cat([hidden[..., :1], hidden[..., 1:2] + 1, hidden[..., 2:] + scores], dim=-1)


class LayeredTable(PreTrainedModel, GenerationMixin):
    """Scores are the sum of the layers' tables (V, V, V); rows without padding."""

    config_class = TableConfig

    def __init__(self, tables):
        config = TableConfig(vocab_size=tables[0].shape[-1])
        config.num_hidden_layers = len(tables)
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, 1)
        self.head = nn.Linear(1, config.vocab_size, bias=False)
        self.layers = nn.ModuleList([Layer(table, i) for i, table in enumerate(tables)])
        self.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=None, eos_token_id=None)
        self.all_tied_weights_keys = {}

    @property
    def table(self):
        return sum(layer.table for layer in self.layers)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(
        self, input_ids, cache=None, past_key_values=None, attention_mask=None, position_ids=None, **kwargs
    ):
        cache = past_key_values if cache is None else cache
        cache = DynamicCache(config=self.config) if cache is None else cache
        tokens = input_ids[..., None].to(self.dtype)
        scores = tokens.new_zeros(*input_ids.shape, self.config.vocab_size)
        hidden = torch.cat([tokens, torch.zeros_like(tokens), scores], dim=-1)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden = layer(hidden, cache, position_ids)
        return CausalLMOutputWithPast(logits=hidden[..., 2:], **{CACHE: cache})
