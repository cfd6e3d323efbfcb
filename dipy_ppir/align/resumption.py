"""Where an interrupted affine registration goes on, and what was written down there.

A registration is at a *place*: the step of its pipeline and the level, both counted
from 0 in the order of the run. Each party has a journal of its own (`checkpoint`).
"""

from collections import deque

import numpy as np

from dipy_ppir.align.checkpoint import CheckpointError, begin_or_resume, journal
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.ledger import ROLES

#: So often what an interrupted run had shown is shown again.
REPEATS = 2


class Resumption:
    """What an interrupted run left at this party.

    Parameters
    ----------
    checkpoint : Checkpoint, optional
        without it nothing is kept.

    Attributes
    ----------
    at : tuple of int
        the place where the run goes on.
    """

    def __init__(self, checkpoint=None):
        self.checkpoint, self.at = checkpoint, (0, 0)

    def begin(self, session, facts, limits, *, anew):
        """Find out where an interrupted run goes on; all parties together.

        Parameters
        ----------
        session : Session
        facts : dict
            what the run must have in common with the interrupted one.
        limits : tuple of int
            numbers of steps and levels.
        anew : bool
            whether what was shown leads nowhere, so that all of it is shown again.

        Raises
        ------
        CheckpointError
            if it cannot go on.
        """
        self.at = 0, 0
        if self.checkpoint is None:
            return
        if not begin_or_resume(session, self.checkpoint, facts):
            return
        if anew:
            if session.ledger.resumed >= REPEATS:
                raise CheckpointError(
                    f"this registration was interrupted {REPEATS} times, and all that "
                    "it shows would be shown again; start anew at all parties, without "
                    "--resume"
                )
            return
        places = [r["place"] for r in self.checkpoint.records() if "place" in r]
        with session.phase("agreement"):
            views = session.exchange("resume", places[-1] if places else [0, 0])
        for pid, place in views.items():
            if (
                not isinstance(place, list)
                or len(place) != 2
                or not all(
                    type(n) is int and 0 <= n < limit
                    for n, limit in zip(place, limits, strict=True)
                )
            ):
                raise ProtocolError(
                    f"the {ROLES[pid]} resumes at no possible place", pid
                )
        # Nobody leaves out what another has not seen.
        self.at = min(map(tuple, views.values()))

    def recorded(self, place, name=None):
        """Records of the interrupted run at a place; those that have something."""
        if self.checkpoint is None:
            return []
        here = [r for r in self.checkpoint.records() if r.get("place") == list(place)]
        return here if name is None else [r for r in here if name in r]

    def result(self, place):
        """Parameters that the run had found at a place.

        Raises
        ------
        CheckpointError
            if it had not.
        """
        found = self.recorded(place, "result")
        if not found:
            raise CheckpointError(
                "the checkpoint lacks the result of a level; start anew at all "
                "parties, without --resume"
            )
        return np.array(found[-1]["result"])

    def refuse_repeats(self, place, steps):
        """A level that is interrupted is begun anew, and its steps are shown again.

        Parameters
        ----------
        place : tuple of int
        steps : int
            of the level.

        Raises
        ------
        CheckpointError
            if they would be shown too often.
        """
        shown = [record["step"] for record in self.recorded(place, "step")]
        before = len(shown)
        # Each interruption shows the first step once more.
        if before + steps > REPEATS * steps or shown.count(1) > REPEATS:
            raise CheckpointError(
                f"this level was interrupted after {before} steps in all, which would "
                "be shown again; start anew at all parties, without --resume"
            )

    def refuse_again(self, labels):
        """What is opened at the end says something of where the run has come to.

        Parameters
        ----------
        labels : sequence of str
            of what is about to be opened; records have them under "opens".

        Raises
        ------
        CheckpointError
            if it was opened as often as may be.
        """
        if self.checkpoint is None:
            return
        for label in labels:
            before = sum(label in r.get("opens", ()) for r in self.checkpoint.records())
            if before >= REPEATS:
                raise CheckpointError(
                    f"what the registration shows at its end ({label}) was shown "
                    f"{before} times already; start anew at all parties, without "
                    "--resume"
                )

    def evaluations(self, session, evaluate, place):
        """A metric as a function of parameters, which is not evaluated twice.

        Parameters
        ----------
        session : Session
        evaluate : callable
            returns value and gradient.
        place : tuple of int
            of all evaluations.

        Returns
        -------
        evaluate : callable
        """
        if self.checkpoint is None:
            return evaluate
        recorded = deque(self.recorded(place, "parameters"))

        def answer(parameters):
            given = np.asarray(parameters).tolist()
            if recorded and recorded[0]["parameters"] == given:
                record = recorded.popleft()
                return record["value"], np.array(record["gradient"])
            recorded.clear()
            if place < self.at:
                raise CheckpointError(
                    "the checkpoint does not fit this program, which takes another "
                    "path; start anew at all parties, without --resume"
                )
            value, gradient = evaluate(parameters)
            record = {"place": list(place), "parameters": given, "value": float(value)}
            record["gradient"] = np.asarray(gradient).tolist()
            journal(session, self.checkpoint, **record)
            return value, gradient

        return answer
