"""What every fit says about itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peerscale.laws.bootstrap import Bootstrap
from peerscale.laws.results import FitStatus, Number, fields_to_plain, to_plain


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Common part of the results; each law adds its coefficients."""

    law: ClassVar[str]
    """Its name on the command line and in JSON."""
    form: ClassVar[type]
    """Dataclass of the law's coefficients, whose methods predict; the fit is one too."""
    n: int
    """Runs."""
    status: FitStatus
    objective_name: str
    objective_value: float
    """Summed over the runs."""
    warnings: tuple[str, ...] = ()
    bootstrap: Bootstrap | None = field(default=None, repr=False)

    @property
    def ci(self) -> dict[str, tuple[float, float]]:
        """Bootstrap intervals by coefficient; empty without a bootstrap."""
        return {} if self.bootstrap is None else self.bootstrap.intervals()

    def interval(self, prediction: Callable[[Any], Number]) -> tuple[float, float]:
        """Bootstrap interval of a prediction: `fit.interval(lambda law: law.optimum(1e21).loss)`.

        Raises:
            ValueError: the fit has no bootstrap.
        """
        if self.bootstrap is None:
            raise ValueError("the fit has no bootstrap: ask for one, such as bootstrap=4000")
        return self.bootstrap.interval_of(self.form, prediction)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and finite numbers for JSON."""
        plain = fields_to_plain(self)
        draws = plain.pop("bootstrap")  # long: last
        return {"law": self.law} | plain | {"ci": to_plain(self.ci), "bootstrap": draws}
