"""Pieces of emitted classes, with words in capitals that stand for names."""

from __future__ import annotations

MASKS = """
    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        \"""The decoder makes its masks itself: it has to know where a row begins.\"""
        return attention_mask
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
