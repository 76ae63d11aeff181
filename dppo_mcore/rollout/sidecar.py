"""The process that hosts `sglang.Engine`, in SGLang's own environment, for one trainer rank.

    python -m dppo_mcore.rollout.sidecar --socket PATH --parent PID

The trainer listens on the socket, this process connects to it; messages and tensors as in `wire`. It ends, and its
engine's workers with it, when the trainer says so, closes the connection or dies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from dppo_mcore.rollout import wire
from dppo_mcore.rollout.engine_loader import LOADER

GROUP = "dppo"
IDLE_S = 5.0
"""How long a sleep waits for requests that are ending."""


class Sidecar:
    """Serves one connection; every request runs as its own task."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.manager = engine.tokenizer_manager
        self.tasks: set[asyncio.Task[None]] = set()
        self.paused = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer messages until the trainer closes the connection or sends `stop`."""
        lock = asyncio.Lock()
        while True:
            try:
                head = await reader.readexactly(4)
                message = json.loads(await reader.readexactly(wire.body_length(head)))
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if message["op"] == "stop":
                return
            task = asyncio.create_task(self._answer(message, writer, lock))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _answer(self, message: dict[str, Any], writer: asyncio.StreamWriter, lock: asyncio.Lock) -> None:
        try:
            reply = await getattr(self, f"do_{message['op']}")(**message.get("args", {}))
            answer = {"id": message["id"], "ok": reply}
        except Exception as error:
            kind = "refused" if isinstance(error, ValueError | OSError) else "failed"
            answer = {"id": message["id"], "error": str(error) or repr(error), "kind": kind}
            if kind == "failed":
                traceback.print_exc()
        async with lock:
            writer.write(wire.encode(answer))
            await writer.drain()

    async def do_ping(self) -> dict[str, Any]:
        """Alive, with the engine's child processes."""
        return {"pid": os.getpid(), "children": self.engine.get_all_child_pids()}

    async def do_generate(
        self, rid: str, input_ids: list[int], sampling: dict[str, Any], media: Any, score_from: int | None
    ) -> dict[str, Any]:
        """One answer; `media` is a `wire.share` handle of embeddings and positions, or patches."""
        images, videos = _media_items(input_ids, media) if media else (None, None)
        out = await self.engine.async_generate(
            rid=rid,
            input_ids=input_ids,
            sampling_params=sampling,
            image_data=images,
            video_data=videos,
            return_logprob=True,
            logprob_start_len=-1 if score_from is None else score_from,
        )
        meta = out["meta_info"]
        answer = {
            "ids": out["output_ids"],
            "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
            "finish": meta["finish_reason"],
            "versions": [[v["version"], v["start"], v["end"]] for v in meta.get("weight_versions") or ()],
            "cached": meta.get("cached_tokens", 0),
        }
        if score_from is not None:
            answer["input_logprobs"] = [entry[0] for entry in meta["input_token_logprobs"]]
        return answer

    async def do_abort(self, rid: str | None) -> None:
        """End one request, or all."""
        self.manager.abort_request(rid=rid or "", abort_all=rid is None)

    async def do_pause(self, mode: str) -> None:
        """Hold generation: `retract` or `in_place`."""
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self.manager.auto_create_handle_loop()
        await self.manager.pause_generation(PauseGenerationReqInput(mode=mode))
        self.paused = True

    async def do_resume(self) -> None:
        """Go on."""
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        await self.manager.continue_generation(ContinueGenerationReqInput())
        self.paused = False

    async def do_flush(self) -> None:
        """Empty the radix cache."""
        result = await self.manager.flush_cache()
        if not result.success:
            raise ValueError("the cache was not flushed: requests are still running or waiting")

    async def do_begin(self) -> None:
        """Open a weight update."""
        from sglang.srt.managers.io_struct import BeginWeightUpdateReqInput

        _check(await self.manager.begin_weight_update(BeginWeightUpdateReqInput(), None))

    async def do_end(self, version: int) -> None:
        """Close it; the cache goes, since other weights filled it."""
        from sglang.srt.managers.io_struct import EndWeightUpdateReqInput

        _check(await self.manager.end_weight_update(EndWeightUpdateReqInput(), None))
        await self.do_flush()

    async def do_load_shared(self, handle: dict[str, Any], version: int) -> None:
        """Load one bucket from the trainer's memory."""
        await self._command({"bucket": handle}, version)

    async def do_fingerprints(self, shapes: dict[str, list[int]]) -> dict[str, int]:
        """Sum over the engine's ranks of each tensor's fingerprint; inside an update only."""
        from dppo_mcore.rollout.fingerprint import add

        folder = tempfile.mkdtemp(prefix="dppo-fingerprints-")
        try:
            await self._command({"fingerprint": {"folder": folder, "shapes": shapes}}, None)
            totals: dict[str, int] = {}
            for file in sorted(Path(folder).glob("*.json")):
                for name, value in json.loads(file.read_text()).items():
                    totals[name] = add(totals.get(name, 0), value)
            return totals
        finally:
            shutil.rmtree(folder)

    async def _command(self, command: dict[str, Any], version: int | None) -> None:
        """Hand a command to every scheduler rank through the custom loader."""
        import torch
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        payload = [(json.dumps(command), torch.empty(0))]
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[
                MultiprocessingSerializer.serialize(payload) for _ in range(self.engine.server_args.tp_size)
            ],
            load_format=LOADER,
            flush_cache=False,
            weight_version=None if version is None else str(version),
        )
        _check(await self.manager.update_weights_from_tensor(request, None))

    async def do_join_group(self, address: str, port: int, backend: str) -> None:
        """Form the weight group; the trainer's leader is rank 0, the engine's ranks follow."""
        from sglang.srt.managers.io_struct import InitWeightsUpdateGroupReqInput

        request = InitWeightsUpdateGroupReqInput(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=1 + self.engine.server_args.tp_size,
            group_name=GROUP,
            backend=backend,
        )
        _check(await self.manager.init_weights_update_group(request, None))

    async def do_leave_group(self) -> None:
        """Leave it."""
        from sglang.srt.managers.io_struct import DestroyWeightsUpdateGroupReqInput

        _check(
            await self.manager.destroy_weights_update_group(DestroyWeightsUpdateGroupReqInput(group_name=GROUP), None)
        )

    async def do_load_broadcast(self, slots: list[Any], version: int) -> None:
        """Receive one flat bucket from the group and load it."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput

        tensors = [wire.Slot.from_json(value) for value in slots]
        request = UpdateWeightsFromDistributedReqInput(
            names=[slot.name for slot in tensors],
            dtypes=[slot.dtype for slot in tensors],
            shapes=[list(slot.shape) for slot in tensors],
            group_name=GROUP,
            load_format="flattened_bucket",
            flush_cache=False,
            weight_version=str(version),
        )
        _check(await self.manager.update_weights_from_distributed(request, None))

    async def do_load_disk(self, path: str, version: int) -> None:
        """Load a Hugging Face directory."""
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        request = UpdateWeightFromDiskReqInput(model_path=path, weight_version=str(version), flush_cache=False)
        success, message, _ = await self.manager.update_weights_from_disk(request, None)
        _check((success, message))

    async def do_sleep(self, tags: list[str]) -> None:
        """Release memory; only when idle, or the scheduler would die of its own assertion.

        Right after an answer, or an abort, the scheduler still counts it as running: it is asked more than once.
        """
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        deadline = time.monotonic() + IDLE_S
        while True:
            try:
                if self.manager.rid_to_state and not self.paused:
                    raise ValueError("sleep: requests are still running; abort or pause them first")
                await self.do_flush()
                break
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        await self.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags), None)

    async def do_wake(self, tags: list[str]) -> None:
        """Take memory back."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        await self.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags), None)


def _check(result: Any) -> None:
    success, message = result if isinstance(result, tuple) else (result.success, result.message)
    if not success:
        raise ValueError(message)


def _media_items(input_ids: list[int], media: dict[str, Any]) -> tuple[list[Any] | None, list[Any] | None]:
    """SGLang's pre-processed form: one item per modality, all its media one after the other."""
    import torch

    tensors = wire.attach_all(media)
    ids = torch.tensor([input_ids])
    items: dict[str, list[Any] | None] = {"image": None, "video": None}
    for kind in media["kinds"]:
        item: dict[str, Any] = {
            "format": "processor_output",
            "modality": kind.upper(),
            "input_ids": ids,
            f"{kind}_grid_thw": tensors[f"{kind}.grids"],
        }
        if f"{kind}.embeddings" in tensors:
            item["precomputed_embeddings"] = tensors[f"{kind}.embeddings"]
            item["mrope_positions"] = _continued(tensors["positions"], len(input_ids)).unsqueeze(1)
            item["mrope_position_delta"] = tensors["delta"].view(1, 1)
        else:
            name = "pixel_values" if kind == "image" else "pixel_values_videos"
            item[name] = tensors[f"{kind}.patches"]
        if kind == "video":
            item["second_per_grid_ts"] = tensors["video.seconds"]
        items[kind] = [item]
    return items["image"], items["video"]


def _continued(positions_3L: Any, length: int) -> Any:
    """Positions of the prompt carried on over the answer's tokens that follow it, int64 [3, length]."""
    import torch

    more = length - positions_3L.shape[1]
    after = torch.arange(more) + positions_3L.max() + 1
    return torch.cat([positions_3L, after.expand(3, more)], dim=1)


def _end_with(parent: int) -> None:
    """Kill this process group once the trainer is gone, even if the event loop hangs."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(os.getpgid(0), signal.SIGKILL)


async def _connect_and_serve(engine: Any, path: str) -> None:
    reader, writer = await asyncio.open_unix_connection(path, limit=wire.MAX_MESSAGE)
    writer.write(wire.encode({"id": -1, "ok": {"pid": os.getpid()}}))
    await writer.drain()
    await Sidecar(engine).serve(reader, writer)


def main() -> None:
    """Start the engine described on stdin, connect, serve, and take the whole process group down at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--socket", required=True, help="socket the trainer listens on")
    parser.add_argument("--parent", type=int, required=True, help="process id of the trainer's rank")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with, args=(arguments.parent,), daemon=True).start()
    options = json.loads(sys.stdin.read())
    import sglang

    engine = sglang.Engine(**options, custom_weight_loader=[LOADER])
    try:
        engine.loop.run_until_complete(_connect_and_serve(engine, arguments.socket))
    finally:
        os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()
