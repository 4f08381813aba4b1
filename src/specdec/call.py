"""One call: from what the target's ``generate()`` prepared, through the rounds, to what it would return.

Everything that a call needs (state, caches, noise, the draft's run) is made here and dies here, so that an
exception in mid-round leaves nothing half-done behind. Knows no option by name. Read next: ``outputs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from math import ceil
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.abroad import brought_home
from specdec.clock import clock
from specdec.errors import InvalidInput, UnsupportedModel
from specdec.layouts.compiled import CompiledSteps
from specdec.layouts.facts import CACHE, odd_states
from specdec.layouts.handover import is_callers
from specdec.length import DraftLength
from specdec.length.fixed import Fixed
from specdec.loop import decode
from specdec.noise import seed_of
from specdec.outputs import Collector
from specdec.processing import Processing
from specdec.proposers import Call, Nothing, one_a_row
from specdec.proposers.jump import begun_behind
from specdec.records import Round, Stats
from specdec.sampling import Sampling, asked_of
from specdec.scorer import Scorer, warn_plain
from specdec.state import FOREVER, State
from specdec.stopping import Watcher
from specdec.transfer import to_host
from specdec.weights.adapters import device_of


@dataclass(frozen=True)
class Request:
    """What the user asked of a call beside the options that ``generate()`` prepares.

    Attributes:
        proposer: what guesses.
        length: makes the rule of how many guesses a round from (batch, do_sample).
        sampling: makes the way to draw from (do_sample, seed, device, prompts).
        layout: "auto", or the one to use.
        seed: None, one, or one a row.
        streamer: told of every step, or None.
        inputs: the user's model inputs beside the ids, for the draft.
        steps: the target's graphs, or None to run it eagerly.
        stats: filled in as the call goes.
        start: when the call began, by ``perf_counter``.
        tenants: whose text it is: one for all rows, one each, or None.
        home: where ids and scores go in the end, None where they are.
        decodings: counts how often the call has begun to decode.
    """

    proposer: Any
    length: Callable[[int, bool], DraftLength]
    sampling: Callable[[bool, Any, torch.device, Callable[[], list[list[int]]]], Sampling]
    layout: str
    seed: int | list[int] | None
    streamer: Any
    inputs: dict[str, Any]
    steps: CompiledSteps | None
    stats: Stats
    start: float
    tenants: list[str] | None = None
    home: torch.device | None = None
    decodings: Iterator[int] = field(default_factory=count)


Followed = tuple[State, Round, np.ndarray]


def run_call(request: Request, model: Any, input_ids: Tensor, **prepared: Any) -> Any:
    """Decode what ``generate()`` prepared, to the end; see ``follow_call``."""
    rounds = follow_call(request, model, input_ids, **prepared)
    while True:
        try:
            next(rounds)
        except StopIteration as end:
            return end.value
        except RuntimeError as error:
            # what Python makes of a StopIteration that a callback raised inside of a generator
            if isinstance(error.__cause__, StopIteration):
                raise error.__cause__ from None
            raise


def follow_call(
    request: Request,
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Generator[Followed, None, Any]:
    """Decode what ``generate()`` prepared, round by round; the arguments are those of its ``custom_generate``.

    Yields after every round the state, the round, and (B,) the columns of each row that nothing will take back;
    returns what ``generate()`` returns. A generator that is closed in the middle leaves nothing behind.

    Args:
        request: what the user asked.
        model: the model that ``generate()`` hands over (some wrappers hand over an inner one).
        input_ids: (B, P) prompt, or the decoder's start.
        logits_processor: as prepared.
        stopping_criteria: as prepared.
        generation_config: as prepared.
        model_kwargs: model inputs beside the ids, as prepared.
    """
    # a generate() of the model's own may decode several times, as Whisper's does for long recordings
    number, streamer = next(request.decodings), request.streamer
    stats, seed = Stats() if number else request.stats, seed_of(request.seed, number)
    length = request.length(len(input_ids), generation_config.do_sample)
    state = _state(model, input_ids, generation_config, stopping_criteria, model_kwargs, length.most)
    # the prompt draws the first token, and a guess needs room for itself and one more
    room = state.max_length - state.prompt_length > 2
    collector = Collector(generation_config, state, model, model_kwargs)
    processing = Processing(logits_processor, state.prompt, state.end_ids)
    guesses = processing.foresees or not isinstance(request.proposer, Nothing)
    speculates = room and guesses and length.most > 0 and not collector.takes_steps
    length = length if speculates else Fixed(0)
    inputs = _repeated(model, request.inputs, state.batch, generation_config.num_return_sequences)
    sampling = request.sampling(generation_config.do_sample, seed, state.device, lambda: asked_of(state, inputs))
    tenants = None if request.tenants is None else one_a_row(request.tenants, state.batch, "tenant")
    if streamer is not None:
        streamer.put(input_ids.cpu())
    # the caller will go on with the cache: it is returned, or the caller's own
    cache_is_seen = bool(generation_config.return_dict_in_generate) or is_callers(model_kwargs.get(CACHE))
    target = Scorer(
        model, model_kwargs, generation_config, max_length=state.max_length, layout=request.layout,
        returns_cache=cache_is_seen, steps=request.steps,
    )  # fmt: skip
    # by rejection the text depends on the guesses, and a given seed promises one text
    promised = seed is not None and sampling.keeps_logits
    call = Call(
        target=model,
        prompt=state.prompt,
        inputs=inputs,
        max_length=state.max_length,
        processing=processing,
        sampling=sampling,
        length=length,
        tenants=tenants,
        clock=None if promised else clock,
        scorer=target,
    )
    watcher = Watcher(stopping_criteria, streamer, state)
    stateful = processing.in_lockstep
    # where a condition ends rows that would come to the end of their positions, none may be ahead of the others
    processing.in_lockstep |= watcher.watches and state.batch > 1 and target.outgrown(state.max_length)
    proposer: Any = begun_behind(request.proposer, call) if speculates else Nothing()
    if stateful and watcher.watches:
        # a processor with state must not be called for a step that a condition would have prevented
        length = Fixed(0)
    rounds = decode(
        state, target, proposer, length, processing, sampling, stats,
        keep_logits=collector.keeps_logits, keep_states=_states_kept(collector, proposer, target),
    )  # fmt: skip
    try:
        for round_ in rounds:
            collector.add(round_)
            watcher.follow(state, collector.scores)
            yield state, round_, watcher.final(state)
    except BaseException:
        # before the first token the whole prompt is fed; later the last one may stand where a guess was fed
        sure = np.maximum(state.lengths - 1, state.prompt_length)
        target.abandon(state.tokens, sure, state.live)
        raise
    finally:  # a stream may be closed in the middle
        _count(stats, state, target, proposer, processing)
        if number:
            request.stats.add(stats)
        request.stats.seconds = perf_counter() - request.start
    if streamer is not None:
        streamer.end()
    if hasattr(proposer, "finish"):
        proposer.finish(state, request.stats)
    if length.most > 0 and target.settled and stats.layout == "plain" and request.layout == "auto":
        warn_plain(model, target.reason)
    pad = generation_config._pad_token_tensor
    sequences = state.text(None if pad is None else int(pad)).to(input_ids.device)
    cache = target.finish(state.tokens, int(state.lengths.max()) - 1) if cache_is_seen else None
    request.stats.seconds = perf_counter() - request.start
    out = collector.output(sequences, stats, cache)
    return out if request.home is None else brought_home(out, request.home)


def _state(
    model: Any, input_ids: Tensor, config: Any, criteria: Any, model_kwargs: dict[str, Any], guesses: int
) -> State:
    """The committed tokens at the start, and where rows end."""
    prompt = input_ids.to(device_of(model, input_ids.device))
    if prompt.shape[1] == 0 and model_kwargs.get("inputs_embeds") is None:
        raise InvalidInput(
            "the prompt is empty and the model has no bos token to begin with; give at least one token"
        )
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    starts = np.zeros(len(prompt), dtype=np.int64)
    if mask is not None and mask.shape == prompt.shape:
        starts = np.argmax(to_host(mask != 0), axis=1).astype(np.int64)
    # criteria that the user gave have replaced the one of their type that generate() built; each of them ends a row
    ends = [c.eos_token_id.reshape(-1).to(prompt.device) for c in criteria if type(c) is EosTokenCriteria]
    limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    longest = ceil(min(limits, default=config.max_length))
    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None) or FOREVER
    return State(
        prompt,
        max_length=longest,
        max_guesses=guesses,
        eos_ids=torch.cat(ends) if ends else None,
        # shorter rows of a pass are filled up with it, and an id that does not exist must not be fed (Llama's -1,
        # or one that was added to a tokenizer only)
        pad_id=pad if 0 <= pad < vocabulary else 0,
        starts=starts,
    )


def _repeated(model: Any, inputs: dict[str, Any], batch: int, samples: int) -> dict[str, Any]:
    """The user's inputs with one row a row of the batch: ``num_return_sequences`` makes ``samples`` of each."""
    main = inputs.get(model.main_input_name)
    # a generate() of a model's own may have made them itself (Whisper), and then asks for one of each
    rows = batch // max(samples, 1) if main is None else int(main.shape[0])
    if rows == batch or batch % rows:
        return inputs
    repeated = {}
    for name, value in inputs.items():
        # positions in time, height and width come before the batch; what has other rows belongs to no row
        along = int(name == "position_ids" and value.ndim == 3)
        mine = value.shape[along : along + 1] == (rows,)
        repeated[name] = value.repeat_interleave(batch // rows, dim=along) if mine else value
    return repeated


def _states_kept(collector: Collector, proposer: Any, target: Scorer) -> tuple[str, ...]:
    """Names of the states that the caller asked for, and of those that the draft wants."""
    if not getattr(proposer, "wants_hidden", False):
        return collector.keeps_states
    if odd_states(target.model) is not None:
        raise UnsupportedModel(
            f"the draft wants hidden states, and those of {type(target.model).__name__} have shapes of their own; "
            "give another draft"
        )
    return tuple({*collector.keeps_states, target.give_hidden()})


def _count(stats: Stats, state: State, target: Scorer, proposer: Any, processing: Processing) -> None:
    """What is known only at the end; stop conditions may have taken tokens back."""
    stats.target_forwards, stats.layout = target.forwards, target.layout.name
    stats.draft_forwards = getattr(proposer, "forwards", 0)
    stats.draft_layout = getattr(proposer, "layout", "")
    stats.drafting = getattr(proposer, "drafting", "")
    stats.host_copies = state.host_copies + processing.host_copies
    stats.row_emitted = state.lengths - state.prompt_length
    stats.emitted = int(stats.row_emitted.sum())
