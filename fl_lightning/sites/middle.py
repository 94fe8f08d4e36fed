"""The server's half of split models whose clients are at sites."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from fl_lightning.client import Broadcast, ClientInfo, Exam
from fl_lightning.executors.executor import Message, Outcome, Task
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.sites.jobs import MissingError
from fl_lightning.sites.turn import Turn
from fl_lightning.split.body import ServerBody
from fl_lightning.split.cut import Cut
from fl_lightning.split.executor import Relay, SplitServer
from fl_lightning.split.fit import SplitFit
from fl_lightning.split.module import SplitModule
from fl_lightning.state import State


class Middle:
    """Says who holds what of a split model, and takes the server's part in fits and exams.

    Args:
        server: Chooses the cuts.
        local: What runs a fit; already set up.
        threads: Threads that torch uses, at least 1.

    Raises:
        ValueError: If fits are to be repeated and averaged.
    """

    def __init__(self, server: SplitServer, local: LocalTraining, threads: int) -> None:
        if type(local.plan) is not FitPlan:
            raise ValueError("local.plan must be null where sites hold parts of a split model")
        assert isinstance(local.module, SplitModule)
        self.server, self.local, self.threads = server, local, threads
        self.module = local.module
        self.name = secrets.token_hex(4)  # of this run's parts
        self._bodies: dict[tuple[str, int], State] = {}  # that a stage's models go with, by stage and client

    @property
    def in_turn(self) -> bool:
        """Whether there is one body, which clients train one after another."""
        return self.server.in_turn

    def cut(self, info: ClientInfo) -> Cut:
        """Return where a client's model is cut; at the first block that the server holds before that is chosen."""
        return self.server.cuts.get(info.id) or self.module.cut_at(self.module.start)

    def part(self, state: State, info: ClientInfo) -> State:
        """Return those tensors of a model that a client holds."""
        return {name: state[name] for name in self.module.parts(self.cut(info)).client}

    def turn(self, info: ClientInfo, message: Message) -> Turn | None:
        """Return the server's half of a fit or an exam; None of a request, which trains nothing."""
        if isinstance(message, Broadcast) and message.request:
            return None
        cut, local, acting = self.cut(info), self.local, self._acting(message)

        def new_body() -> ServerBody:
            given = {**message.state, **message.here} if isinstance(message, Broadcast) else message.state
            if isinstance(message, Exam) and message.stage:
                given = self._bodies[message.stage, info.id]
            initial = {name: local.initial[name] for name in self.module.parts(cut).body}
            return acting.new_body(self.module, local.optimizer, {**initial, **given}, local.device, guarded=True)

        precision = local.precision if isinstance(message, Broadcast) else "32-true"
        return Turn(new_body, cut, self.server.shapes, precision, self.threads)

    def sent(self, turn: Turn, states: dict[str, State]) -> dict[str, State]:
        """Return what of a task's states goes to the site."""
        body = set(self.module.parts(turn.cut).body)
        own = {name: tensor for name, tensor in states["state"].items() if name not in body}
        return {**{key: state for key, state in states.items() if key != "here"}, "state": own}

    def left(self, turn: Turn, info: ClientInfo, message: Broadcast) -> State:
        """Return what a fit leaves at the server; of a stage, the body is kept for its exams."""
        if message.stage:
            self._bodies[message.stage, info.id] = self.behind(turn)
        return self._acting(message).left_of(turn.body, () if message.stage else message.here)

    def behind(self, turn: Turn) -> State:
        """Return the tensors of the body behind a client's cut, as they are now."""
        names = set(self.module.parts(turn.cut).body)
        return {name: tensor for name, tensor in turn.body.state().items() if name in names}

    def one_by_one(
        self, tasks: Iterable[Task], run: Callable[[Sequence[Task]], Iterator[Outcome]]
    ) -> Iterator[Outcome]:
        """Have fits done one after another, through one body; whoever is missing is called once more at the end."""
        relay, order, late = Relay(), deque(tasks), set()
        while order:
            info, message = order.popleft()
            assert isinstance(message, Broadcast)
            relay.hand(message)
            for outcome in run([(info, message)]):
                if isinstance(outcome.error, MissingError) and info.id not in late:
                    late.add(info.id)
                    order.append((info, message))
                    continue
                if outcome.update is not None:
                    relay.take(outcome.update, outcome.own_is_finite)
                yield outcome

    def _acting(self, message: Message) -> SplitFit:
        """Return the callback that cuts the model in this work."""
        if not (isinstance(message, Broadcast) and message.stage):
            return self.server
        callbacks = self.local.stages[message.stage].federated_callbacks
        if (found := next((one for one in callbacks if isinstance(one, SplitFit)), None)) is None:
            raise ValueError(
                f"callbacks.{message.stage} trains the whole model, of which a site holds a part; take "
                "fl_lightning.split.personal_stage.PersonalStage"
            )
        return found
