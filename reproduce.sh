#!/usr/bin/env bash
# bash reproduce.sh demo            set up, then a student undefended, distilled and with InfoARD, on
#                                   rendered shapes, offline: minutes
# bash reproduce.sh test            set up, then the test suite
# bash reproduce.sh tables SCALE    set up, then T1 (frameworks), T2 (ablation), T4 (NAMID) and T5
#                                   (MID); killed, it goes on
#                                   SCALE: smoke (minutes), cpu (two cores, hours), gpu (one
#                                   GPU), paper (published settings); more options go to every run
# bash reproduce.sh cells SCALE     the same runs as lines of options, to choose from; so are those
#                                   of `cells evidence [PART]` and `cells lite`; --dry-run in any of
#                                   these says how many and how long, and begins none
# bash reproduce.sh evidence        set up, then the runs of results/evidence: every framework, parts and
#                                   controls, teachers; two cores, six hours; `evidence first`:
#                                   the longer runs of its first part; `evidence distance`: radii by
#                                   the teacher's distance, three hours; `evidence plugins`: InfoARD
#                                   beside IGDM, SAAD and averaged weights, two hours; `evidence
#                                   wider`: a student seven times larger, two hours; `evidence
#                                   tuned`: AdaAD at a learning rate of its own, an hour; `evidence
#                                   gpu`: one H100, a night, ResNet-18
# bash reproduce.sh gpu             set up, then ten minutes that try a machine with CUDA: smoke, parity
#                                   with the CPU, speed, four students; --device cpu: a dry run
# bash reproduce.sh lite            set up, then accuracy against time of steps and their schedules:
#                                   two cores, 2 hours; more options go to every run
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python

setup() {  # an environment in .venv, made again when requirements.txt changes
    [ -x $PY ] || "${PYTHON:-python3}" -m venv .venv
    cmp -s requirements.txt .venv/installed && return
    echo "setting up .venv (5 GB with CUDA, about a minute)"
    $PY -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed
}

demo() {
    $PY infoard.py demo "$@"
    echo "next: $PY infoard.py --dataset cifar10 --device cuda"
}

cells() {  # needs no environment: the standard library alone
    "${PYTHON:-python3}" -m companions.recipes cells "$@"
}

case " $* " in  # which needs no environment either
    " tables"*" --dry-run "* | " evidence"*" --dry-run "* | " lite"*" --dry-run "*)
        exec "${PYTHON:-python3}" -m companions.recipes "$@" ;;
esac
case "${1:-}" in
    demo) setup; shift; demo "$@" ;;
    test) setup; shift; exec $PY -m pytest -q -n 2 "$@" ;;
    cells) shift; cells "$@" ;;
    tables) cells "${2:-}" > /dev/null; setup; exec $PY -m companions.recipes "$@" ;;
    evidence) cells "${@:1:2}" > /dev/null; setup; exec $PY -m companions.recipes "$@" ;;
    lite) setup; exec $PY -m companions.recipes "$@" ;;
    gpu) setup; exec $PY infoard.py "$@" ;;
    *) sed -n '2,/^set/s/^# //p' "$0"; exit 2 ;;
esac
