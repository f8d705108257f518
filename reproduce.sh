#!/usr/bin/env bash
# bash reproduce.sh demo            set up, then the main job offline on rendered shapes: minutes
# bash reproduce.sh test            set up, then the test suite
# bash reproduce.sh tables SCALE    set up, then T1 (frameworks) and T2 (ablation); killed, it goes on
#                                   SCALE: smoke (minutes), cpu (two cores, 2 hours), gpu (one GPU),
#                                   paper (the published protocol); options after it go to every run
# bash reproduce.sh cells SCALE     the same runs as lines of options, for infoard.py sweep
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
    local out=runs/demo
    $PY infoard.py --resume --eval-subset 200 --out $out/infoard
    $PY infoard.py --resume --eval-subset 200 --out $out/undefended --framework natural --no-figures
    echo && echo "defended (infoard) and undefended student, same data, epochs and seed:"
    $PY infoard.py tables $out
    echo "pictures: $out/infoard/figures"
    echo "next: $PY infoard.py --dataset cifar10 --device cuda"
}

scale() {  # sets seeds, parallel, blocks (a folder and what is special to it) and common options
    seeds="0 1 2" parallel=1 blocks="."
    case $1 in
        smoke) seeds="0 1"
               common="--subset 300 --val-size 30 --epochs 1 --steps 2 --teacher-epochs 12
                       --batch-size 50 --eval-subset 40" ;;
        cpu)   seeds="0 1" parallel=2  # a process of one thread for each seed
               common="--dataset cifar10 --subset 10000 --student tiny --teacher-arch tiny_wide
                       --epochs 10 --steps 5 --teacher-epochs 20 --eval-subset 1000" ;;
        gpu)   seeds="0"
               common="--dataset cifar10 --device cuda --student resnet18 --teacher-arch wrn_16_4
                       --epochs 5 --steps 5 --teacher-epochs 10 --eval-subset 1000" ;;
        paper) blocks="cifar10-resnet18 --dataset cifar10 --student resnet18
                       cifar10-mobilenet_v2 --dataset cifar10 --student mobilenet_v2
                       cifar100-resnet18 --dataset cifar100 --student resnet18
                       cifar100-mobilenet_v2 --dataset cifar100 --student mobilenet_v2
                       tinyimagenet-resnet18 --dataset tinyimagenet --student resnet18"
               common="--device cuda --recipe paper --eval-subset 0
                       --attacks clean,fgsm,pgd,cw,aa" ;;
        *)     echo "SCALE is smoke, cpu, gpu or paper, not $1" >&2; exit 2 ;;
    esac
    common="$common --no-figures --no-progress"
}

T1="mtard at trades ard rslad iad adaad igdm saad"  # mtard first: it makes both teachers
T2="asa       --mim off
    uniform   --mim off --asa uniform
    shuffled  --mim off --asa shuffled
    student   --mim off --asa student
    steps     --mim off --steps-lo 1
    features  --asa off --w-att 0
    attention --asa off --w-feat 0
    relation  --asa off --mim off --w-rel 1
    mim       --asa off"

cells() {  # SEED [options for every run] -> a line of options for each run of that seed
    local seed=$1 block special framework name options; shift
    while read -r block special; do
        case $special in  # RobustBench has no teacher for Tiny-ImageNet: one is trained
            *cifar*--student*) [[ $common = *paper* ]] && special+=" --teacher robustbench:Chen2021LTD_WRN34_10" ;;
        esac
        for framework in $T1; do
            for name in plain infoard; do
                options="--framework $framework"
                [ $name = infoard ] || options+=" --no-infoard"
                echo "--out $dir/$block/T1/$framework/$name/s$seed --seed $seed" $options $special $common "$@"
            done
        done
        while read -r name options; do
            echo "--out $dir/$block/T2/$name/s$seed --seed $seed" $options $special $common "$@"
        done <<< "$T2"
    done <<< "$blocks"
}

tables() {  # [options for every run]
    local seed pids=() block
    trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM
    [ $parallel = 1 ] || export OMP_NUM_THREADS=1
    [ $parallel = 1 ] || cells 0 "$@" | head -n 1 | $PY infoard.py sweep -  # the teachers, once
    for seed in $seeds; do
        cells "$seed" "$@" | $PY infoard.py sweep - & pids+=($!)
        [ $parallel != 1 ] || wait $!
    done
    for seed in "${pids[@]}"; do wait "$seed"; done
    for block in $(find "$dir" -type d -name T1); do  # T2 begins and ends with two runs of T1
        cp -r "$block/rslad/plain" "$block/rslad/infoard" "$block/../T2"
    done
    $PY infoard.py tables "$dir"
}

case "${1:-}" in
    demo) setup; demo ;;
    test) setup; shift; $PY -m pytest -q test_infoard.py "$@" ;;
    tables) scale "${2:-}"; dir=runs/tables/$2; shift 2; setup; tables "$@" ;;
    cells) scale "${2:-}"; dir=runs/tables/$2; shift 2; for seed in $seeds; do cells "$seed" "$@"; done ;;
    *) sed -n '2,7s/^# //p' "$0"; exit 2 ;;
esac
