"""The training loop: our step, on the devices, precisions and processes of Lightning Fabric."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..deploy.progress import ProgressLine
from ..images import Picture, write_image
from ..nets import BaseConfig
from .batches import Batches
from .critic import Critic
from .data import ImageFolder, Sample, mixed
from .degradations import degrade
from .engine import number_of_workers, start_fabric
from .evaluation import Evaluation, gathered
from .interruption import Interruption, TrainingInterrupted, leave_signals_to_the_run
from .journal import Journal
from .losses import WeightedLoss
from .run_config import write_config
from .run_files import BEST, CHECKPOINT, WEIGHTS, RunState, write_state
from .run_images import crop_shapes, images_of, recipe_of, scale_of_step
from .settings import TrainingSettings
from .supervision import supervise
from .trained_net import TrainedNet
from .validation import evaluate, side_by_side

Tell = Callable[[str], None]


class TrainingStopped(RuntimeError):
    """A step gave NaN or infinity; its batch was saved, and the last checkpoint is from before it.

    >>> issubclass(TrainingStopped, RuntimeError)
    True
    """


def train(
    config: BaseConfig,
    settings: TrainingSettings,
    *,
    state: RunState | None = None,
    line: ProgressLine | None = None,
    tell: Tell = lambda text: None,
) -> Path:
    """Train a net; a run that was interrupted goes on from its last checkpoint, to the bit on the same machine.

    Args:
        config: of the net.
        settings: of the training.
        state: where an interrupted run stands, as `read_state` gives it.
        line: a line on the terminal that follows the run.
        tell: called with a line for whatever should be known.

    Returns:
        The folder of the run.

    Raises:
        FileExistsError: if a run of that name exists and `state` is not given.
        FileNotFoundError: if a folder of images does not exist.
        ValueError: if images, recipe, loss, device or batch do not fit; all are checked before the first step.
        TrainingStopped: if a step gives NaN or infinity.
        TrainingInterrupted: after SIGINT (Ctrl-C) or SIGTERM, when the step under way is made and saved; a second
            signal stops at once.

    >>> from ..nets import AutoConfig
    >>> train(AutoConfig.from_name("span", scale=4), TrainingSettings(data="nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: there is no folder nowhere: give --data FOLDER
    """
    run = _Run(config, settings, state, tell)
    silent = run.fabric.global_rank > 0
    with Interruption(silent=silent) as interruption:
        run.go(Journal(run.folder, settings.steps, line, tell, first_step=run.first_step, silent=silent), interruption)
    return run.folder


class _Run:
    """A run: what is made once, and the step."""

    def __init__(self, config: BaseConfig, settings: TrainingSettings, state: RunState | None, tell: Tell) -> None:
        self.config, self.settings, self.tell = config, settings, tell
        self.scale: int = getattr(config, "scale", 1)
        torch.manual_seed(mixed(settings.seed, 4))  # a discriminator has start weights too
        self.recipe, self.loss = recipe_of(config, settings, tell), WeightedLoss(settings.loss)
        self.loss.check(*crop_shapes(config, settings))
        self.samples, self.validation = images_of(config, settings, tell)
        self.folder = Path(settings.runs) / (settings.name or f"{config.model_type}x{self.scale}")
        if state is None and (self.folder / CHECKPOINT).exists():
            raise FileExistsError(f"{self.folder} exists: give another --name, or go on by: claritycore resume")
        self.first_step, self.best = (0, None) if state is None else (state.step, state.best)
        # A run that ended in a validation saved its step and owes what it would have found.
        self.validated = 0 if state is None else state.validated
        self.owing = self.validated is not None and self.validated < self.first_step and self._due(self.first_step)
        if state is not None and settings.steps <= state.step and not self.owing:
            raise ValueError(f"{self.folder} has made {state.step} steps already: give more by --steps")
        self.fabric = start_fabric(settings)
        self.batches = self._batches()
        self.model = TrainedNet(config, settings, self.fabric, state, tell)
        self.loss.to(self.fabric.device)
        self.critic = Critic(self.loss, settings, self.fabric)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if state is not None:
            if state.images not in (None, len(self.samples)):
                tell(f"{state.images} images were trained on, now {len(self.samples)}: others are drawn from here on")
            self.critic.load_state_dict(state.critic)
            if self.scaler is not None and state.scaler is not None:
                self.scaler.load_state_dict(state.scaler)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.fabric.global_rank == 0:
            write_config(self.folder / "run.toml", config, settings)

    def go(self, journal: Journal, interruption: Interruption) -> None:
        settings, batches = self.settings, iter(self.batches)
        try:
            journal.start()
            if self.owing:
                self.validate(self.first_step, journal)
                self.save(self.first_step)
            for step in range(self.first_step, settings.steps):
                values = self.step(step, batches)
                done, last = step + 1, step + 1 == settings.steps
                journal.follow(done, values["loss"])
                if done % settings.log_every == 0 or last:
                    journal.write(done, lr=settings.lr_at(step), **self._mean(values))
                if due := self._due(done):
                    self.save(done)  # a validation that fails costs no finished steps
                    self.validate(done, journal)
                number = self._agreed(interruption.number)
                if due or done % settings.save_every == 0 or last or number:
                    self.save(done)
                if number and not last:
                    self.fabric.barrier()  # the processes that wait do not end before the one that saves
                    told = f"interrupted after step {done} of {settings.steps}, which is saved"
                    raise TrainingInterrupted(f"{told}: claritycore resume {self.folder} goes on", number)
        finally:
            journal.close()

    def _due(self, step: int) -> bool:
        """Whether a validation follows that many steps."""
        return self.validation is not None and (step % self.settings.validate_every == 0 or step == self.settings.steps)

    def _mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes, each of which has its part of the batch."""
        if self.fabric.world_size == 1:
            return values
        means = self.fabric.all_reduce(torch.tensor(list(values.values()), device=self.fabric.device))
        return dict(zip(values, cast(Tensor, means).tolist(), strict=True))

    def _agreed(self, number: int) -> int:
        """The signal that any of the processes has got: a terminal sends it to all, a scheduler perhaps to one."""
        if self.fabric.world_size == 1:
            return number
        most = self.fabric.all_reduce(torch.tensor(number, device=self.fabric.device), reduce_op="max")
        return int(cast(Tensor, most))

    def step(self, step: int, batches: Iterator[Sample]) -> dict[str, float]:
        """Make one step of the optimiser; return what to log of it."""
        micro_batches = self.settings.accumulate
        # What a net draws at random follows from the step, so that a resumed run draws the same.
        torch.manual_seed(mixed(self.settings.seed, 3, step, self.fabric.global_rank))
        for group in self.model.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(step)
        self.model.optimizer.zero_grad()
        self.critic.begin(step)
        scale = scale_of_step(self.config, self.settings, step)
        values: dict[str, Tensor] = {}
        for micro in range(micro_batches):
            clean, degraded, report = self._pair(_next(batches), scale)
            with self.fabric.no_backward_sync(self.model.net, enabled=micro < micro_batches - 1):
                output = self.model(degraded, scale)
                supervise(output.aux, report, scale=scale, clean=clean)
                with self.fabric.autocast():
                    loss, parts = self.loss(output.image, clean, step)
                total = loss + output.aux.total().to(loss)
                self._check(total, step, clean, degraded)
                self.fabric.backward(total / micro_batches)
            judged = self.critic.look(output.image.detach(), clean, step)
            for name, value in {"loss": total, **parts, **output.aux.losses, **judged}.items():
                values[name] = values.get(name, 0.0) + value.detach().float() / micro_batches
        self._clip(step, clean, degraded)
        self.model.step(step)
        self.critic.step()
        # A device is waited for once, not for each value.
        return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))

    def validate(self, step: int, journal: Journal) -> None:
        """Restore the validation images, write the figures down, and keep the best weights."""
        net, fabric, images = self.model.shipped(), self.fabric, cast(ImageFolder, self.validation)
        self.validated = step
        recipes = self.settings.validation_recipes or (self.settings.recipe,)
        found = evaluate(net, images, recipes=recipes, rank=fabric.global_rank, processes=fabric.world_size)
        found = Evaluation.merge(gathered(found, fabric.world_size))
        self.model.plain.train()
        if fabric.global_rank:
            return
        for recipe, means in found.means().items():
            journal.write(step, recipe=recipe, **{f"validation_{name}": value for name, value in means.items()})
            figures = f"PSNR {means['psnr']:.2f} dB, SSIM {means['ssim']:.4f} over {len(images)} images"
            self.tell(f"step {step}, {recipe}: {figures}")
        for number in range(min(self.settings.pictures, len(images))):
            self._draw(step, images, number, net, journal)
        psnr = sum(means["psnr"] for means in found.means().values()) / len(recipes)
        if self.best is None or psnr > self.best:
            self.best = psnr
            net.save_pretrained(self.folder / BEST)

    def _draw(self, step: int, images: ImageFolder, number: int, net: nn.Module, journal: Journal) -> None:
        """Write a validation picture, in a folder as that of its image."""
        recipe = (self.settings.validation_recipes or (self.settings.recipe,))[0]
        panels = side_by_side(net, images[number], recipe, mixed(self.settings.seed, 5, number), self.scale)
        name = images.paths[number].relative_to(images.folder).with_suffix("")
        place = self.folder / "pictures" / name.with_name(f"{name.name}_{step}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        write_image(place, Picture(panels), overwrite=True)
        journal.picture(step, name.as_posix(), panels[0])

    def save(self, step: int) -> None:
        """Write down where the run stands, and the weights that it would ship."""
        states, shipped = self.model.states(), self.model.shipped()
        self.model.plain.train()
        if self.fabric.global_rank:
            return
        state = RunState(
            step=step,
            config=self.config,
            settings=self.settings,
            critic=self.critic.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            best=self.best,
            images=len(self.samples),
            validated=self.validated,
            **states,
        )
        write_state(self.folder, state)
        shipped.save_pretrained(self.folder / WEIGHTS)

    def _batches(self) -> DataLoader[Sample]:
        settings, fabric, workers = self.settings, self.fabric, number_of_workers(self.settings)
        numbers = Batches(
            settings.batch_size,
            self.first_step,
            settings.steps,
            rank=fabric.global_rank,
            processes=fabric.world_size,
            accumulate=settings.accumulate,
        )
        pinned = fabric.device.type == "cuda"
        return DataLoader(
            self.samples,
            batch_sampler=numbers,
            num_workers=workers,
            pin_memory=pinned,
            worker_init_fn=leave_signals_to_the_run,
        )

    def _pair(self, sample: Sample, scale: int) -> tuple[Tensor, Tensor, dict[str, Tensor] | None]:
        """Bring a batch to the device, and degrade it there unless it came in pairs; say what was drawn for it."""
        clean, report = sample.clean.to(self.fabric.device, non_blocking=True), None
        if sample.degraded.numel():
            degraded = sample.degraded.to(self.fabric.device, non_blocking=True)
        else:
            with torch.no_grad():
                degraded, report = degrade(clean, self.recipe, cast(Tensor, sample.seed), scale=scale)
        return clean, degraded.contiguous(memory_format=torch.channels_last), report

    def _clip(self, step: int, clean: Tensor, degraded: Tensor) -> None:
        """Bound the norm of the gradient; without a bound it is measured, since NaN in it is to go no further."""
        most = self.settings.clip or math.inf
        norm = self.fabric.clip_gradients(self.model.net, self.model.optimizer, max_norm=most, error_if_nonfinite=False)
        # With float16 a gradient may overflow: its scaler then leaves the step out.
        if self.scaler is None and norm is not None and not bool(norm.isfinite()):
            self._stop(step, clean, degraded, norm)

    def _check(self, loss: Tensor, step: int, clean: Tensor, degraded: Tensor) -> None:
        """Stop before NaN gets into the weights; all processes together, since each waits for the others' gradients."""
        finite = self.fabric.all_reduce(loss.detach().isfinite().float(), reduce_op="sum")
        if cast(Tensor, finite) < self.fabric.world_size:
            self._stop(step, clean, degraded, loss)

    def _stop(self, step: int, clean: Tensor, degraded: Tensor, found: Tensor) -> NoReturn:
        path = self.folder / f"bad_batch_step{step}_process{self.fabric.global_rank}.pt"
        torch.save({"step": step, "clean": clean.cpu(), "degraded": degraded.cpu(), "found": float(found)}, path)
        raise TrainingStopped(f"step {step} gave NaN or infinity: its batch is in {path}; try a lower --lr, or --clip")


def _next(batches: Iterator[Sample]) -> Sample:
    try:
        return next(batches)
    except ValueError as error:  # of an image that proves damaged; a worker puts its traceback in front
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
