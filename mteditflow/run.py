"""A run is a folder: what is written there, and how a killed run goes on as if it had not been.

config.yaml  rubric.txt (of reward.rubric)  contents.json (what was behind names)  metrics.jsonl  tensorboard/
strips/  judge/  checkpoints/  set_aside/ (what came after an iteration that was gone back to; results of a run that
went on)
evaluating_before|after/ (at work)  evaluation_before|after.json  comparison.json  lora/ (or weights/, of full
fine-tuning)  report.html
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from mteditflow.config import Config
from mteditflow.config.cli import to_yaml
from mteditflow.config.rubric import read_rubric
from mteditflow.data import all_instructions, cut_lines, held_out_tasks, training_tasks
from mteditflow.distributed import Ranks
from mteditflow.evaluate.best import Best
from mteditflow.evaluate.compare_editors import compare_sessions
from mteditflow.evaluate.comparison_page import final_table, held_out_rows
from mteditflow.evaluate.edival import Evaluation, held_out_figures
from mteditflow.evaluate.exposure import evaluate_editor, num_sessions
from mteditflow.evaluate.held_out import (
    has_truth,
    part_folder,
    save_comparison,
    save_evaluation,
)
from mteditflow.evaluate.kept import (
    CONTENTS,
    find_saved,
    kept_evaluation,
    load_before,
    problem_of,
)
from mteditflow.evaluate.parts import PartFolder
from mteditflow.export.weights import BEST, STANDING, save_result
from mteditflow.objective import Objective
from mteditflow.plan.compiling import SAID, choose_compile, settle
from mteditflow.policy import AdapterName, build_policy, start_adapter
from mteditflow.policy.optimizer import build_optimizer, check_weights, load_optimizer, moments_like, optimizer_state
from mteditflow.policy.pipelines import is_slow_in_bfloat16
from mteditflow.profile.account import Account, step_seconds
from mteditflow.profile.base_error import measure_base_error
from mteditflow.record import alarms, checkpoint, ending
from mteditflow.record.clock import phase
from mteditflow.record.files import retire, write_json
from mteditflow.record.metrics import FILE, Reporter, read_lines
from mteditflow.report.run_report import write_report
from mteditflow.report.seen import Seen, choose_of_all, cut_seen, save_seen, table_rows
from mteditflow.report.strips import save_strips
from mteditflow.reward import Judged, build_reward, say_waits
from mteditflow.reward.overlap import Overlap, efficiency
from mteditflow.transformer.compiled import count_graphs
from mteditflow.transformer.sharded import make_mesh
from mteditflow.types import Rollout, Rollouts
from mteditflow.watch.progress import working


class Run:
    """Policy, optimizer, reward and folder of a run, from its newest checkpoint where there is one.

    Only the main rank writes. However a run ends, it goes on after the last iteration that was finished; of full
    fine-tuning, whose state is too large to be held twice, after the newest checkpoint.
    """

    def __init__(self, config: Config, objective: Objective, ranks: Ranks, resume_from: int | None = None) -> None:
        """resume_from: iteration of the checkpoint to go back to; None: the newest."""
        self.config, self.objective, self.ranks, self.resume_from = config, objective, ranks, resume_from
        self.folder = Path(config.run.folder)
        self._unsaved: tuple[int, checkpoint.State] | None = None  # iterations done, and a copy of the state after them
        self._warned: set[str] = set()
        self._lines: list[dict[str, Any]] = []  # metrics of every iteration, on the main rank
        self.base_error: dict[str, float] = {}  # of a quantised base, in the metrics of the first iteration
        self.best = Best(config, ranks)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:  # what fails here lets go of the folder too
            self._start(stack)
            self._stack = stack.pop_all()
        ending.begin(self._save_unsaved)
        return self

    def _start(self, stack: ExitStack) -> None:
        config = self.config
        self.tasks = held_out_tasks(config)  # whose pictures are read: where too few are whole, nothing is loaded first
        # before the editor: a judge that is not there is found at once
        self.judge = Overlap(build_reward(config), config.reward, self.ranks.device)
        stack.enter_context(self.judge)
        if self.ranks.is_main:
            stack.enter_context(checkpoint.lock(self.folder))
        with_choice, compile_line = choose_compile(config, self.ranks.device.type)
        saved, self.contents = find_saved(config, self.ranks, self.resume_from)
        if self.ranks.is_main:
            rubric = read_rubric(config.reward.rubric) if config.reward.rubric else ""
            checkpoint.keep_rubric(self.folder, rubric, is_resumed=saved is not None)
        is_probed = saved is None and config.model.quantised is not None
        is_probed &= self.ranks.is_main or config.distributed.shard != "none"  # a forward pass is then one of all ranks
        with working(f"loading {config.model.path}") if self.ranks.is_main else nullcontext():
            self.policy = build_policy(
                with_choice.model, config.lora, config.run.seed, has_old=self.objective.has_old,
                keeps_originals=is_probed, mesh=make_mesh(config.distributed, self.ranks),
            )  # fmt: skip
        self.optimizer, self.first_iteration = build_optimizer(self.policy, config), 0
        if saved:
            self._restore(saved)
        self._num_saved = self.num_done = self.first_iteration
        self._graphs = count_graphs()
        settled = settle(self.policy, self.objective, training_tasks(config, 0, self.ranks), config, self.ranks)
        lines = [f"attention {self.policy.attention}, {compile_line}", *SAID[settled], *say_waits(config, self.ranks)]
        if torch.backends.mps.is_available() and self.ranks.device.type == "cpu":
            lines.append("training runs on the CPU: Apple's GPU (MPS) is not used (docs/start.md)")
        self.ranks.barrier()
        if self.ranks.is_main:
            self._open(stack, lines, is_resumed=saved is not None)
        self._evaluate_before(is_resumed=saved is not None)
        if self.ranks.is_main:
            self.account = stack.enter_context(Account(config, self.policy, self.ranks.world_size))

    def _open(self, stack: ExitStack, lines: list[str], *, is_resumed: bool) -> None:
        config = self.config
        num = config.run.num_iterations
        self.reporter = Reporter(self.folder, iteration=self.first_iteration, num_iterations=num, config=config)
        stack.callback(self.reporter.close)
        self._lines = read_lines(self.folder / FILE)
        cut_seen(self.folder, self.first_iteration)
        if is_resumed and any(True for _ in self.iterations()):  # before config.yaml says how many there are
            self._retire_results()
        (self.folder / "config.yaml").write_text(to_yaml(config))
        write_json(self.folder / CONTENTS, self.contents, is_durable=True)
        going_on = f", going on after iteration {self.first_iteration}" if is_resumed else ""
        self.reporter.say(f"{self.policy.adapters.num_modules} modules adapted, run folder {self.folder}{going_on}")
        if self.policy.editor.is_distilled and self.objective.blurs_distilled:
            self.reporter.say(
                f"model.path {config.model.path!r} is distilled, and objective.name {config.objective.name} blurs such "
                f"a model: take its base model, or another objective"
            )
        if is_slow_in_bfloat16(self.policy.device) and self.policy.dtype == torch.bfloat16:
            self.reporter.say(f"model.base {config.model.base!r} computes in bfloat16, slowly here: float32 is faster")
        for line in [*lines, *self._cut()]:
            self.reporter.say(line)
        self._say_graphs("at the start")

    def _retire_results(self) -> None:
        """Set aside what was made of the weights that are trained further: nothing must take it for the end's."""
        aside = retire(self.folder, f"results-{self.first_iteration:06d}", checkpoint.results(self.folder))
        if aside:
            self.reporter.say(f"training goes on: the results after iteration {self.first_iteration} are in {aside}")

    def _cut(self) -> list[str]:
        """Say how many instructions of a user's data are longer than the text encoder reads."""
        count = self.policy.family.count_tokens(self.policy.pipeline)
        return cut_lines(all_instructions(self.config), count, self.config.model.max_text_tokens)

    def _say(self, line: str) -> None:
        """Print a line for the user, on the main rank."""
        if self.ranks.is_main:
            self.reporter.say(line)

    def _evaluate_before(self, *, is_resumed: bool) -> None:
        """Evaluate what training starts from, where that was not done before."""
        config = self.config
        if self.policy.originals:
            error = measure_base_error(self.policy, self.objective, self.tasks[0], config)
            self.base_error = error.figures
            self._say(str(error))
        self._problem = problem = problem_of(self.tasks, config, self.contents)
        before = self.ranks.from_main(load_before(self.folder, problem, self._say) if self.ranks.is_main else None)
        if before is None:
            before = self._evaluate_start()
            if self.ranks.is_main:
                save_evaluation(self.folder, "before", before, problem)
        self.before: Evaluation = before
        if self.ranks.is_main:
            self._parts("before", 0).remove()
            if not is_resumed:
                self._parts("after", 0).remove()  # of weights that are no longer there
                save_strips(self.folder, 0, self.tasks, before, before)

    def _evaluate_start(self) -> Evaluation:
        """Evaluate the base, or the LoRA of lora.init_from."""
        policy, lora = self.policy, self.config.lora
        if not lora.init_from:
            return kept_evaluation(
                policy, self.tasks, self.config, self.ranks, lambda: self._evaluate("before", "off", 0), self._say
            )
        self._say(
            f"evaluating {lora.init_from}, of rank {lora.rank} and alpha {lora.alpha}, from which training starts"
        )
        with start_adapter(policy, lora) as adapter:
            return self._evaluate("before", adapter, 0)

    def _say_graphs(self, when: str) -> None:
        """Say how many graphs were compiled since the last time, if any were."""
        before, self._graphs = self._graphs, count_graphs()
        num, seconds = (now - then for now, then in zip(self._graphs, before, strict=True))
        if num:
            folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
            self.reporter.say(f"{when}: {num} graphs compiled in {seconds:.0f} s (kept in {folder})")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:  # while the folder is held, and before anything that may take long
                ending.save()
        finally:
            self._stack.close()

    def iterations(self) -> Iterator[int]:
        """Count the iterations that are to come, until all are done, or held-out O does not rise any more."""
        while self.num_done < self.config.run.num_iterations and not self.best.is_over:
            yield self.num_done

    def record(self, iteration: int, values: dict[str, float], rollout: Rollout | Rollouts, scored: Judged) -> None:
        """The end of an iteration: metrics, what the judge saw, evaluation, checkpoint, which comes last."""
        config, done, judged, scores = self.config, iteration + 1, self.judge.read(), scored.scores
        check_weights(self.policy.adapters, self.optimizer, done, self.ranks)
        is_last = done == config.run.num_iterations
        values = values | alarms.rollout_figures(rollout, scores, self.ranks, scored.group, scored.advantages)
        values |= {"update/learning_rate": self.optimizer.param_groups[0]["lr"]}
        chosen = choose_of_all(rollout, scores, config.run.num_judged, self.ranks)
        if values["reward/zero_spread_share"] == 1:
            self._say(f"iteration {done}: all groups without spread, nothing to learn from them")
        is_due = config.evaluation.every > 0 and done % config.evaluation.every == 0 and not is_last
        if is_due or (is_last and config.run.patience):  # the last average may be the best
            values |= self._short_evaluation(done)
        if self.ranks.is_main:
            values |= self._gap([*self._lines, values], values)
            self._report(iteration, values, judged, chosen)
        self.num_done = done
        if done % config.run.save_every == 0 or is_last or self.best.is_over:
            self._save(done, self._state())
        elif self.ranks.is_main and not config.lora.is_full:
            self._unsaved = done, _to_host(self._state())

    def _report(self, iteration: int, values: dict[str, float], judged: dict[str, float], chosen: list[Seen]) -> None:
        """Write and print the figures of an iteration."""
        config, done = self.config, iteration + 1
        self._lines.append(values)
        values = values | alarms.added_figures(self._lines)
        self._warn(alarms.find_alarms(values), values, done)
        self._say_graphs(f"iteration {done}")
        base_error = self.base_error if iteration == 0 else {}
        save_seen(self.folder, "training", iteration, config.reward.judge, chosen)
        account = self.account.read(values["update/num_transitions"] / self.ranks.world_size)  # of a rank
        judged["reward/overlap_efficiency"] = efficiency(judged, step_seconds(account))
        self.reporter.write(iteration, values | base_error | account | judged)

    def _gap(self, lines: list[dict[str, Any]], by_truth: dict[str, float]) -> dict[str, float]:
        """Hold the judge against an evaluation; nothing where that is the same judge's, and no truth."""
        return alarms.held_out_figures(lines, by_truth) if has_truth(self.tasks) else {}

    def _warn(self, names: list[str], values: dict[str, float], done: int) -> None:
        """A line for each alarm that was not raised before in this process."""
        for name in [name for name in names if name not in self._warned]:
            self.reporter.say(f"iteration {done}: {alarms.describe(name, values[name])}")
        self._warned |= set(names)

    @phase("evaluate")
    def _short_evaluation(self, done: int) -> dict[str, float]:
        now = self._evaluate("", "ema", done)
        if self.ranks.is_main:
            picture = save_strips(self.folder, done, self.tasks, self.before, now)
            self.reporter.image("strips", done, picture)
        values = held_out_figures(now)
        values |= self.best.see(now, self.before, done, lambda: self.policy.adapters.state("ema"))
        if self.best.is_over:
            self._say(f"iteration {done}: held-out O does not clearly rise any more: training stops (run.patience)")
        return values

    def _evaluate(self, name: str, adapter: AdapterName, done: int) -> Evaluation:
        """Evaluate after `done` iterations, on all ranks, and keep what the judge saw. A whole evaluation has a name,
        by which it goes on after a kill; a short one has none.
        """
        config, is_main, tasks = self.config, self.ranks.is_main, self.tasks
        if not name:
            tasks = tasks[: config.evaluation.num_sessions_short]
            config = replace(config, evaluation=replace(config.evaluation, has_true_inputs=False))
        judge = "exact" if has_truth(tasks) else config.reward.judge

        def see(sessions: list[Seen]) -> None:
            if is_main:
                save_seen(self.folder, "evaluation", done, judge, sessions)
                self.reporter.table("judged", done, table_rows(sessions))

        folder = self._parts(name, done) if name else None
        with (
            self.reporter.show_sessions(num_sessions(tasks, config)) if is_main else nullcontext(lambda _: None) as show
        ):
            return evaluate_editor(
                self.policy, tasks, config, adapter, self.ranks, self.judge,
                see=see if config.run.num_judged else None, folder=folder, show=show,
            )  # fmt: skip

    def _parts(self, name: str, done: int) -> PartFolder:
        path = self.folder / f"evaluating_{name}"
        what = f"after {done} iterations of {self._problem}"
        return part_folder(path, self.policy, self.tasks, self.config, what)

    def finish(self) -> None:
        """Evaluation of the averaged adapter, the best where there are several to choose from, export, report, and the
        table that the user came for.
        """
        done = self.num_done
        if self.best.iteration:
            done = self.best.iteration
            self.policy.adapters.load("ema", self.best.weights)
            self._say(f"the average after iteration {done} of {self.num_done} is evaluated and exported: the best O")
        after = self._evaluate("after", "ema", done)
        if self.ranks.is_main:
            save_evaluation(self.folder, "after", after)
            self._parts("after", done).remove()
            save_comparison(self.folder, self.before, after)
            gap = self._gap(self._lines[:done], held_out_figures(after))
            self._warn(alarms.find_alarms(gap), gap, self.num_done)
            picture = save_strips(self.folder, done, self.tasks, self.before, after)
            self.reporter.image("strips", self.num_done, picture)
            self.reporter.table("held out", self.num_done, held_out_rows(self.folder))
        compare_sessions(self.folder, self.policy, self.tasks, self.before, after, self.config, self.ranks, self.judge)
        with working("exporting") if self.ranks.is_main else nullcontext():
            use = save_result(self.policy, self.config, self.folder, self.ranks, done)
        if self.ranks.is_main:
            report = write_report(self.folder)
            self.reporter.close()
            console = Console()
            console.print(final_table(self.folder))
            console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
            console.print(f"use it: {use}", soft_wrap=True, highlight=False, markup=False)
        self.ranks.barrier()

    @phase("save")
    def _save(self, done: int, state: checkpoint.State) -> None:
        with ending.held():
            checkpoint.save(self.folder, iteration=done, config=self.config, state=state, ranks=self.ranks)
            self._num_saved, self._unsaved = done, None

    def _state(self) -> checkpoint.State:
        names = ("current", "ema", "old") if self.objective.has_old else ("current", "ema")
        state = {name: self.policy.adapters.state(name) for name in names}
        state["optimizer"] = optimizer_state(self.optimizer)
        return state | self.best.state()

    def _save_unsaved(self) -> str:
        """Save the last finished iteration, unless it is; says what the same command does then."""
        if self._unsaved is not None:
            self._save(*self._unsaved)
        return f"goes on after iteration {self._num_saved}" if self._num_saved else "begins with the first iteration"

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        self.first_iteration = saved.iteration
        self.best.restore(saved, self.policy.adapters.state("ema"))
        for name in (*saved.held, *saved.cut):
            if name not in ("optimizer", STANDING, BEST):
                self.policy.adapters.load(name, saved.read(name, self.policy.adapters.state(name)))  # pyright: ignore[reportArgumentType]
        load_optimizer(self.optimizer, saved.read("optimizer", moments_like(self.optimizer)))


def _to_host(state: checkpoint.State) -> checkpoint.State:
    """Copy a state to the host."""
    return {group: {name: t.to("cpu", copy=True) for name, t in tensors.items()} for group, tensors in state.items()}
