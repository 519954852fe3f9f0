"""Nerfstudio's trainer, with checkpoints that cannot be lost and errors a user can read."""

from __future__ import annotations

import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nerfstudio.engine.optimizers import Optimizers
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from gsscale_nerfstudio import checkpoint, resuming
from gsscale_nerfstudio.datamanager import GSScaleDatamanagerConfig
from gsscale_nerfstudio.errors import GSScaleError, readable_errors, warn
from gsscale_nerfstudio.evaluation import leave_moments_on_disk
from gsscale_nerfstudio.interruption import Interrupted, Interruption
from gsscale_nerfstudio.optim import DeferredAdam
from gsscale_nerfstudio.out_of_memory import (
    NoRoomError,
    in_short,
    is_out_of_memory,
    no_room_left,
    retried,
    tried_again,
)
from gsscale_nerfstudio.pipeline import GSScalePipeline
from gsscale_nerfstudio.random_state import random_state, restore_random_state
from gsscale_nerfstudio.render_command import adapt_ns_render
from gsscale_nerfstudio.supported import require_device, require_one_process
from gsscale_nerfstudio.undo import Undo

RESUME = "gsscale"
"""The entry of a checkpoint that exact resuming takes beside Nerfstudio's own."""


@dataclass
class GSScaleTrainerConfig(TrainerConfig):
    """Trainer configuration of gsscale."""

    _target: type = field(default_factory=lambda: GSScaleTrainer)

    def save_config(self) -> None:
        """Write the run's ``config.yml``, the first file of it."""
        self._name_lists_as_data()
        with readable_errors():
            # Here, because Nerfstudio starts the others next.
            require_one_process(self.machine.num_devices * self.machine.num_machines)
            try:
                super().save_config()
            except OSError as error:
                raise GSScaleError(
                    f"could not write to the run's folder: {error}; choose another --output-dir"
                ) from error

    def _name_lists_as_data(self) -> None:
        """Let a run whose data every folder can find find its lists from there, too.

        With relative data it must be loaded from this folder or one that looks like it: then
        lists stay as they are.
        """
        manager = self.pipeline.datamanager
        if not isinstance(manager, GSScaleDatamanagerConfig):
            return
        if not (manager.data or manager.dataparser.data).is_absolute():
            return
        for name in ("train_list", "eval_list"):
            if (path := getattr(manager, name)) is not None:
                setattr(manager, name, path.absolute())

    def get_checkpoint_dir(self) -> Path:
        """Folder of this run's checkpoints.

        ``ns-eval`` and its siblings ask for it and then load the newest file there, come what may.
        This is the last moment to steer them past a damaged one, and to adapt them to such runs.
        """
        folder = super().get_checkpoint_dir()
        leave_moments_on_disk(GSScaleTrainerConfig)
        adapt_ns_render()
        # A resumed run's file of settings names the step of another run that it began with.
        step = self.load_step
        if step is None or not checkpoint.path_of(folder, step).exists():
            try:
                self.load_step = checkpoint.newest_step(folder)
            except GSScaleError:  # training, which asks, too, begins anew: who loads is to say it
                self.load_step = None
        return folder


class GSScaleTrainer(Trainer):
    """What ``ns-train gsscale`` runs."""

    config: GSScaleTrainerConfig
    pipeline: GSScalePipeline

    def __init__(self, config: GSScaleTrainerConfig, *args: Any, **kwargs: Any) -> None:
        load_step = config.load_step
        super().__init__(config, *args, **kwargs)
        # It has asked for the checkpoint folder, to write there; what to load is another matter.
        config.load_step = load_step
        self._random_state: dict[str, Any] | None = None
        self._saved = -1
        """The step of the newest checkpoint that the present run has written or loaded."""
        self._done = -1, 0
        """The last complete step, and the engine's count of steps after it."""
        self._interruption = Interruption(self._leave_the_loop)

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        with readable_errors():
            require_device(self.device)
            try:
                super().setup(test_mode)
            except KeyboardInterrupt:
                CONSOLE.print("gsscale: interrupted before training began")
                sys.exit(128 + signal.SIGINT)
        self.pipeline.datamanager.before_eval_image = self._interruption.check

    def train(self) -> None:
        if self._random_state is not None:
            # Not before: setting up draws, too.
            restore_random_state(self._random_state, self.device)
            self._random_state = None
        with readable_errors():
            try:
                self._train()
            except KeyboardInterrupt:
                # Also how a viewer that was left on after training is ended.
                completed = self.training_state == "completed"
                self._tell_what_is_saved("training is complete" if completed else "interrupted")
                sys.exit(0 if completed else 128 + (self._interruption.signal or signal.SIGINT))

    def _train(self) -> None:
        """Train, and save what is done if that ends before its time."""
        self.pipeline.plan_memory()
        resuming.tell_overwritten(self.config, self.checkpoint_dir)
        self._saved = self._start_step - 1
        self._done = self._saved, self.pipeline.model.engine.step_count
        with self._interruption:
            try:
                super().train()
            except Interrupted:
                self.save_before_the_end()
                raise
            except Exception as error:
                # What has no sentence was not expected: who knows what it has left of the scene.
                unforeseen = not isinstance(error, GSScaleError)
                self.save_before_the_end(keep_others=unforeseen, failed=True)
                raise

    def _leave_the_loop(self) -> None:
        """Have Nerfstudio's loop, also where it waits as long as training is paused, left."""
        self.stop_training = True

    def _after_train(self) -> None:
        self._interruption.check()  # the loop may have been left for it
        super()._after_train()

    def _train_complete_viewer(self) -> None:
        self._interruption.check()  # while the last step was saved
        self._interruption.end()  # Nerfstudio's viewer waits for Ctrl-C
        super()._train_complete_viewer()

    def _tell_what_is_saved(self, ended: str) -> None:
        """Print what a run leaves, and how it has ended."""
        saved = checkpoint.newest_step(self.checkpoint_dir)
        if saved is None:
            left = (
                f"nothing is saved, because it is every {self.config.steps_per_save:,} steps "
                "(--steps-per-save) and at the end"
            )
        else:
            rest = self._start_step + self.config.max_num_iterations - 1 - saved
            left = f"to go on from step {saved:,} give --load-dir {self.checkpoint_dir}"
            if rest > 0:
                left += f" --max-num-iterations {rest}, and the other flags as before"
        CONSOLE.print(f"gsscale: {ended}; {left}", markup=False, soft_wrap=True)

    def setup_optimizers(self) -> Optimizers:
        optimizers = super().setup_optimizers()
        of_rows = DeferredAdam
        self._undo = Undo(
            {k: v for k, v in optimizers.optimizers.items() if not isinstance(v, of_rows)}
        )
        return optimizers

    def train_iteration(self, step: int) -> Any:
        """One step of training, done again with less in GPU memory where that has run out.

        Raises:
            GSScaleError: it ran out, and nothing can be given up any more.
            Interrupted: training was asked to end.
        """
        self._interruption.check()
        engine = self.pipeline.model.engine
        steps_done = engine.step_count
        periods = self.gradient_accumulation_steps
        self._undo.begin(name for name in self._undo.names if step % periods[name] != 0)
        one_step = super().train_iteration
        try:
            loss, *logged = retried(
                lambda: one_step(step), lambda said, tries: self._go_back(said, tries, steps_done)
            )
        except Exception:
            self._undo.take_back()
            self.pipeline.put_back()
            raise
        finally:
            self._undo.end()
            self.pipeline.step_ended()
        self._done = step, engine.step_count
        # Nerfstudio keeps what is returned until the end of the next step, and a graph, even one
        # that backward has been through, keeps its leaves and their gradients.
        return loss.detach(), *({k: _detached(v) for k, v in each.items()} for each in logged)

    def eval_iteration(self, step: int) -> None:
        """Nerfstudio's evaluations of this step; without memory for them training goes on."""
        evaluate = super().eval_iteration
        try:
            tried_again(lambda: evaluate(step), self.pipeline.model.engine.give_back)
        except NoRoomError as error:
            warn(f"no evaluation after step {step}: {error}")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = in_short(error)
            warn(f"no evaluation after step {step}, because GPU memory ran out in it ({said})")

    def _go_back(self, said: str, tries: int, steps_done: int) -> None:
        """Put everything back to where it was before the step, and make room.

        Rows are stepped last of all and after all memory for it was taken, so either none of them
        have been stepped or all.
        """
        model = self.pipeline.model
        if model.engine.step_count != steps_done:
            raise GSScaleError(
                f"GPU memory ran out when a step was complete but for its log ({said}); leave out "
                "--log-gradients"
            )
        self._undo.take_back()
        self.pipeline.draw_again()
        model.engine.abandon()
        if not model.engine.make_room(said, tries):
            # What is left to give up is the view itself, which could be trained piece by piece.
            raise no_room_left(said, model.num_points, model.last_size)

    def _load_checkpoint(self) -> None:
        path = resuming.checkpoint_to_load(self.config)
        if path is None:
            super()._load_checkpoint()  # which says that there is none
            self.pipeline.tell_without_points()
            return
        checkpoint.remove_unfinished(path.parent.parent)
        state = checkpoint.load(path)
        resuming.require_groups(self.optimizers, state.get("optimizers", {}))
        resuming.tell_other_placement(path, self.pipeline.datamanager.train_dataparser_outputs)
        self._start_step = state["step"] + 1
        self.pipeline.load_pipeline(state["pipeline"], state["step"])
        self.optimizers.load_optimizers(state.get("optimizers", {}))
        if self.config.load_scheduler:
            self.optimizers.load_schedulers(state.get("schedulers", {}))
        self.grad_scaler.load_state_dict(state.get("scalers", {}))
        CONSOLE.print(f"Done loading Nerfstudio checkpoint from {path}")
        resume = state.get(RESUME)
        if resume is None:
            self.pipeline.model.engine.sort()  # splatfacto's rows are in any order
            CONSOLE.print(
                "gsscale: the checkpoint is splatfacto's or of an earlier gsscale: Gaussians and "
                "Adam's moments (where it has them) go on; densification statistics, the order of "
                "images and random numbers begin anew.",
                soft_wrap=True,
            )
        else:
            self.pipeline.resume(resume["pipeline"])
            self._random_state = resume["random"]
            resuming.restore_gradients(self.optimizers, resume.get("gradients", {}))

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write ``step-NNNNNNNNN.ckpt``, in Nerfstudio's format, atomically.

        While training goes on, what hinders that is only warned of: there will be another one.

        Raises:
            GSScaleError: the last checkpoint could not be written.
        """
        try:
            self._save(step)
        except GSScaleError as error:
            if self.training_state == "completed":
                raise
            last = self._start_step + self.config.max_num_iterations - 1
            following = min(step + self.config.steps_per_save, last)
            warn(
                f"saving failed after step {step} ({error.__cause__ or error}); training goes on, "
                f"earlier checkpoints are untouched, and the next one is written after step "
                f"{following}: free disk space until then"
            )

    def _save(self, step: int, keep_others: bool = False) -> None:
        path = checkpoint.path_of(self.checkpoint_dir, step)
        # Between steps, but Nerfstudio lets the viewer's thread render at that time. Rows are
        # written from where they are, so that training waits for the disk: a copy to go on from
        # would take as much memory again as all rows.
        with self.train_lock, self.pipeline.model.engine.store.lent():
            state = {
                "step": step,
                "pipeline": self.pipeline.state_dict(),
                "optimizers": {k: v.state_dict() for k, v in self.optimizers.optimizers.items()},
                "schedulers": {k: v.state_dict() for k, v in self.optimizers.schedulers.items()},
                "scalers": self.grad_scaler.state_dict(),
                RESUME: {
                    "pipeline": self.pipeline.resume_state(),
                    "random": random_state(self.device),
                    "gradients": resuming.gradients_under_way(
                        self.optimizers, self.gradient_accumulation_steps, step
                    ),
                },
            }
            checkpoint.save(state, path, scratch=self.base_dir)
        self._saved = step
        if self.config.save_only_latest_checkpoint and not keep_others:
            try:
                checkpoint.remove_others(path)
            except GSScaleError as error:  # the new one is whole: no reason to stop
                warn(str(error))

    def save_before_the_end(self, keep_others: bool = False, failed: bool = False) -> None:
        """Training ends before its time: save the steps that are complete.

        Not if an error has come up in the middle of stepping rows, or in the last save.

        Args:
            keep_others: whether earlier checkpoints stay in any case.
            failed: whether an error ends it, which is about to be told: then what is saved is, too.
        """
        engine, (step, steps_done) = self.pipeline.model.engine, self._done
        in_a_step = engine.step_count != steps_done
        if in_a_step or step == self._saved or self.training_state == "completed":
            return
        try:
            with self.train_lock:  # the viewer may be drawing
                try:
                    engine.abandon()
                except GSScaleError:  # the worker's, perhaps the one at hand; it is told once
                    engine.abandon()
            if engine.half_stepped:
                raise RuntimeError("the error struck while Gaussians were being stepped")
            self._save(step, keep_others)
        except Exception as error:  # whatever it is, the one that ends training is what counts
            warn(f"the steps up to {step} could not be saved: {error}")
            return
        if failed:
            warn(
                f"training ends here, and the steps up to {step} are saved; once the error below "
                f"is mended, add --load-dir {self.checkpoint_dir} to the command to go on"
            )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
