#!/usr/bin/env bash
# bash reproduce.sh demo    set up, then the main job offline on rendered shapes: minutes on a laptop
# bash reproduce.sh test    set up, then the test suite
set -euo pipefail
cd "$(dirname "$0")"

setup() {  # an environment in .venv, made again when requirements.txt changes
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    cmp -s requirements.txt .venv/installed && return
    echo "setting up .venv (5 GB with CUDA, about a minute)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed
}

demo() {
    local out=runs/demo
    .venv/bin/python infoard.py --resume --eval-subset 200 --out $out/infoard
    .venv/bin/python infoard.py --resume --eval-subset 200 --out $out/undefended --framework natural --no-figures
    echo && echo "defended (infoard) and undefended student, same data, epochs and seed:"
    .venv/bin/python infoard.py tables $out
    echo "pictures: $out/infoard/figures"
    echo "next: .venv/bin/python infoard.py --dataset cifar10 --device cuda"
}

case "${1:-}" in
    demo) setup; demo ;;
    test) setup; shift; .venv/bin/python -m pytest -q test_infoard.py "$@" ;;
    *) sed -n '2,3s/^# //p' "$0"; exit 2 ;;
esac
