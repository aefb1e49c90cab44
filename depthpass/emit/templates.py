"""Pieces of emitted classes, with words in capitals that stand for names."""

from __future__ import annotations

TIES = """
    _tied_weights_keys = {
        rf"LAYERS\\.{p}\\.": rf"LAYERS\\.{BLOCKS.index(b)}\\." for p, b in enumerate(BLOCKS) if BLOCKS.index(b) != p
    }

    def get_expanded_tied_weights_keys(self, all_submodels=False):
        \"""Visits of one block share its weights, whatever the config says of the embeddings.\"""
        tied = {}
        for name, _ in self.named_parameters(remove_duplicate=False):
            visit = re.fullmatch(r"LAYERS\\.(\\d+)\\.(.+)", name)
            if visit and not name.endswith((".a", ".b")):
                first = BLOCKS.index(BLOCKS[int(visit[1])])
                if first != int(visit[1]):
                    tied[name] = f"LAYERS.{first}.{visit[2]}"
        return tied
"""
"""Ties of a decoder; LAYERS stands for the name of its blocks."""

MASKS = """
    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        \"""The decoder makes its masks itself: it has to know where a row begins.\"""
        return attention_mask
"""

BIASES = """
    def _adjust_bias(self, output_embeddings, input_embeddings):
        \"""Shared blocks stay as they are: their Conv1D has its bias along the other side.\"""
        if isinstance(output_embeddings, nn.Linear):
            super()._adjust_bias(output_embeddings, input_embeddings)
"""

NO_PAGES = """
    def init_continuous_batching(self, *args, **kwargs):
        raise NotImplementedError("continuous batching keeps keys and values in pages, and nothing else of earlier tokens; this "
                                  "model reads streams or keys of other layers. Use generate.")

    continuous_batching_context_manager = init_continuous_batching
"""

CHUNKS = """
        # A bridge reads at least CHUNK tokens earlier: so many run at once, behind the keys of those before.
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: this model runs chunks of tokens, whose weights have different shapes.")
        return_dict = kwargs.pop("return_dict", None)
        keep_cache = self.config.use_cache if use_cache is None else use_cache
        CACHE = DynamicCache(config=self.config) if CACHE is None else CACHE
        tokens = input_ids if input_ids is not None else inputs_embeds
        count, outputs = tokens.shape[1], []
        for start in range(0, count, CHUNK):
            end = min(start + CHUNK, count)
            outputs.append(self.chunk(
                ARGUMENTS
            ))
        output = outputs[-1]
        output.last_hidden_state = torch.cat([o.last_hidden_state for o in outputs], 1)
        if output.hidden_states is not None:
            output.hidden_states = tuple(torch.cat(parts, 1) for parts in zip(*(o.hidden_states for o in outputs)))
        if not keep_cache:
            output.CACHE = None
        return output if return_dict is not False else output.to_tuple()
"""
"""Body of a forward that runs chunk by chunk."""

CUT = {
    "input_ids": "input_ids=None if input_ids is None else input_ids[:, start:end],",
    "inputs_embeds": "inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, start:end],",
    "attention_mask": "attention_mask=None if attention_mask is None else "
                      "attention_mask[:, : attention_mask.shape[1] - count + end],",
    "position_ids": "position_ids=None if position_ids is None else position_ids[..., start:end],",
}
