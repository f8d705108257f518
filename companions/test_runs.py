"""What holds for runs.py: with which settings a run may go on."""

import dataclasses

import pytest

import infoard as I
from companions.runs import same_settings
from test_infoard import begun, differences, in_the_earlier_form

each = pytest.mark.parametrize


OTHER_INFOARD = {  # settings that only InfoARD reads, none as by default
    "asa": "off",
    "lam_lo": 0.5,
    "lam_hi": 9.0,
    "steps_lo": 1,
    "mim": "off",
    "w_feat": 9.0,
    "w_att": 9.0,
    "w_rel": 9.0,
    "tau": 9.0,
}


@each("name", OTHER_INFOARD)
def test_a_plain_run_is_not_bound_by_settings_of_infoard(name):
    other = {name: OTHER_INFOARD[name]}
    lifted = I.Config().resolved()
    plain = I.Config(infoard=False).resolved()
    with pytest.raises(I.InfoardError, match=I.flag_of(name)):
        same_settings(dataclasses.asdict(lifted) | other, lifted)
    same_settings(dataclasses.asdict(plain) | other, plain)
    with pytest.raises(I.InfoardError, match="--infoard"):  # what was lifted is not plain
        same_settings(dataclasses.asdict(lifted) | other, plain)


@each("name", ["critic_dim", "framework", "teacher", "alpha"])
def test_a_plain_run_is_bound_by_settings_of_others(name):
    plain = I.Config(infoard=False).resolved()
    with pytest.raises(I.InfoardError, match=I.flag_of(name)):
        same_settings(dataclasses.asdict(plain) | {name: 99}, plain)


def test_an_earlier_run_keeps_the_options_of_its_framework():
    namid = I.Config(infoard=False, framework="at", own={"mi_bound": "dv"})
    settings = in_the_earlier_form(dataclasses.asdict(namid))
    same_settings(settings, namid)
    with pytest.raises(I.InfoardError, match="jsd"):
        same_settings({**settings, "mi_bound": "jsd"}, namid)


def test_settings_of_infoard_change_nothing_in_a_plain_run():
    nets = []
    for options in ({}, OTHER_INFOARD):
        made = begun(framework="at", infoard=False, **options)
        nets.append(made.student.state_dict())
    assert differences(*nets) == []
