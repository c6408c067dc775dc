"""Equal losses have no spread, whatever their rounded mean says."""

import numpy as np
import pytest

from adaptive.calibration import normal_log_p


@pytest.mark.parametrize("loss", [0.0, 0.02, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 29, 60, 300])
def test_the_normal_approximation_says_nothing_about_equal_losses(loss: float, n: int) -> None:
    assert (normal_log_p(np.full((n, 2), loss), risk=0.5) == 0.0).all()
    assert (normal_log_p(np.full((n, 1), loss), risk=0.5) == 0.0).all()
