"""Which inputs slots are turned on with one by one."""

import numpy as np

from onnx_adapt.proof.compared import one_by_one

LARGE, SMALL = {"x": np.zeros((2, 9))}, {"x": np.zeros((1, 12))}


def test_of_made_up_inputs_the_smallest_are_enough_for_single_slots() -> None:
    assert one_by_one([LARGE, SMALL], made_up=True) == [SMALL]


def test_inputs_that_are_given_are_all_used_for_single_slots() -> None:
    assert one_by_one([LARGE, SMALL], made_up=False) == [LARGE, SMALL]
