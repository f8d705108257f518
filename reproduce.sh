#!/usr/bin/env bash
# bash reproduce.sh demo            set up, then the main job offline on rendered shapes: minutes
# bash reproduce.sh test            set up, then the test suite
# bash reproduce.sh tables SCALE    set up, then T1 (frameworks), T2 (ablation), T4 (NAMID) and T5
#                                   (MID); killed, it goes on
#                                   SCALE: smoke (minutes), cpu (two cores, hours), gpu (one
#                                   GPU), paper (published settings); more options go to every run
# bash reproduce.sh cells SCALE     the same runs as lines of options, to choose from
# bash reproduce.sh evidence        set up, then the runs of results/evidence: every framework, parts and
#                                   controls, teachers; two cores, 4.5 hours; `evidence first`:
#                                   the longer runs of its first part
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
    local out=runs/demo
    $PY infoard.py --resume --eval-subset 200 --out $out/infoard
    $PY infoard.py --resume --eval-subset 200 --out $out/undefended --framework natural --no-figures
    echo && echo "defended (infoard) and undefended student, same data, epochs and seed:"
    $PY infoard.py tables $out
    echo "pictures: $out/infoard/figures"
    echo "next: $PY infoard.py --dataset cifar10 --device cuda"
}

# The papers' own settings on CIFAR-10; alpha, beta and temperature are infoard.py's defaults too.
# kl-reduction mean: the scale (KL/K) of the code that the CIFAR-10 numbers came from; it makes the
# weight of InfoARD's terms K times larger beside it. Elsewhere KL is summed (on CIFAR-100 released
# AdaAD sums, RSLAD and MTARD have a tenth). IAD's own teacher is an adversarially trained ResNet-18;
# here it gets the default one.
PAPERS="
mtard  --epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --kl-reduction mean --teacher-epochs 100 --teacher robustbench:Zhang2019Theoretically
at     --epochs 110 --schedule 100,105     --weight-decay 5e-4
trades --epochs 76  --schedule 75          --weight-decay 2e-4 --beta 6
ard    --epochs 200 --schedule 100,150     --weight-decay 2e-4 --kl-reduction mean --alpha 1 --temperature 30 --teacher robustbench:Zhang2019Theoretically
rslad  --epochs 300 --schedule 215,260,285 --weight-decay 2e-4 --kl-reduction mean --alpha 0.833333 --teacher robustbench:Zhang2019Theoretically
iad    --epochs 200 --schedule 100,150     --weight-decay 2e-4 --beta 0.1 --temperature 1
adaad  --epochs 200 --schedule 100,150     --weight-decay 5e-4 --kl-reduction mean --alpha 1 --teacher robustbench:Chen2021LTD_WRN34_20
igdm   --epochs 200 --schedule 100,150     --weight-decay 2e-4 --alpha 1 --teacher robustbench:Chen2021LTD_WRN34_20
saad   --epochs 200 --schedule 100,150     --weight-decay 2e-4 --alpha 1 --beta 0 --teacher robustbench:Gowal2021Improving_28_10_ddpm_100m"

T2="
asa       --mim off
uniform   --mim off --asa uniform
shuffled  --mim off --asa shuffled
student   --mim off --asa student
steps     --mim off --steps-lo 1
features  --asa off
attention --asa off --w-feat 0 --w-att 0.05
relation  --asa off --mim off --w-rel 1
mim       --asa off --w-att 0.05"

# NAMID on AT and on TRADES; eq5: estimators as the paper trains them; paper: its alpha at once, too
T4="
at/namid     --framework namid
at/eq5       --framework namid --mi-train difference
at/paper     --framework namid --mi-train difference --alpha 5 --mi-ramp 0
trades/namid --framework namid_trades"

# MID: known attacks (mifgsm, pgd_l2, pgd_t, pgd_sat) and others, white-box and transferred
T5="
undefended --framework natural
plain      --framework at --no-infoard
mid        --framework mid --figures
published  --framework mid_transfer"

scale() {  # SCALE: sets dir, seeds, parallel, common (options of every run) and blocks (of options)
    dir=runs/tables/$1 seeds="0 1 2" parallel=1 blocks=". " student="" strongest=aa
    case $1 in
        smoke) seeds="0 1" parallel=2 student=tiny strongest=apgd
               common="--subset 300 --epochs 1 --steps 2 --teacher-epochs 24 --batch-size 50
                       --eval-subset 40" ;;
        cpu)   seeds="0 1" parallel=2 student=tiny
               common="--dataset cifar10 --subset 10000 --student tiny --teacher-arch tiny_wide
                       --epochs 10 --steps 5 --teacher-epochs 20 --eval-subset 1000" ;;
        gpu)   seeds="0" student=resnet18
               common="--dataset cifar10 --device cuda --student resnet18 --teacher-arch wrn_16_4
                       --epochs 5 --steps 5 --teacher-epochs 10 --eval-subset 1000" ;;
        paper) common="--device cuda --eval-subset 0 --attacks clean,fgsm,pgd,cw,aa"
               blocks="cifar10-resnet18      --dataset cifar10 --student resnet18 --teacher robustbench:Zhang2019Theoretically
                       cifar10-mobilenet_v2  --dataset cifar10 --student mobilenet_v2 --teacher robustbench:Zhang2019Theoretically
                       cifar100-resnet18     --dataset cifar100 --student resnet18 --teacher robustbench:Chen2021LTD_WRN34_10
                       cifar100-mobilenet_v2 --dataset cifar100 --student mobilenet_v2 --teacher robustbench:Chen2021LTD_WRN34_10
                       tinyimagenet-resnet18 --dataset tinyimagenet --student resnet18 --teacher-epochs 100" ;;
        *)     echo "SCALE is smoke, cpu, gpu or paper, not '$1'" >&2; exit 2 ;;
    esac
    common="$common --no-figures --no-progress"
}

run() {  # TABLE/NAME OPTIONS -> the line of options of a run of $block and $seed
    local out=$dir/$block/$1/s$seed; shift
    echo "--out ${out/.\/} --seed $seed" $common "$@" "$more"
}

cells() {  # SEED [options for every run] -> a line of options for each run of that seed
    local seed=$1 block special framework own name options all more=""; shift
    [ $# = 0 ] || more=$(printf '%q ' "$@")
    while read -r block special; do
        while read -r framework own; do
            [ "$block" != . ] || own=""  # only `paper` follows the papers
            [[ $block = cifar10-* ]] || own=${own/--teacher robustbench:*/}
            [[ $block = cifar10-* ]] || own=${own/--kl-reduction mean/}
            run T1/$framework/plain $special $own --framework $framework --no-infoard
            run T1/$framework/infoard $special $own --framework $framework
            [ $framework = rslad ] || continue
            while read -r name options; do
                run T2/$name $special $own $options
            done <<< "${T2#?}"
        done <<< "${PAPERS#?}"
        special=${special/--teacher robustbench:*/}
        while read -r name options; do
            run T4/$name $special $options
        done <<< "${T4#?}"
        all="--attacks clean,fgsm,bim,pgd,pgd_t,mifgsm,cw,$strongest,pgd_l2,spatial"
        while read -r name options; do
            run T5/$name $special $options --transfer --teacher-arch ${student:-${block#*-}} $all
        done <<< "${T5#?}"
    done <<< "$blocks"
}

train() {  # the runs of the lines on standard input; a finished run is not run again
    local line status failed=0 stopped=""
    trap stopped=1 INT TERM  # the run saves and exits, and then so does this
    while read -r line; do
        status=0; eval "$PY infoard.py --resume $line" < /dev/null || status=$?
        [ $status -lt 128 ] && [ -z "$stopped" ] || exit 143
        [ $status = 0 ] || { failed=1; echo "failed: $line" >&2; }
    done
    return $failed
}

tables() {  # [options for every run]
    local seed pid block name failed=0
    set -m  # each job is a process group of its own
    trap 'for pid in $(jobs -p); do kill -- -$pid; done; wait; exit 130' INT TERM
    [ $parallel = 1 ] || export OMP_NUM_THREADS=1
    if [ $parallel != 1 ]; then  # first the runs that make the nets which all seeds share
        for name in "T1/mtard/plain|T5/mid" "T4/at/(namid|eq5)"; do
            cells 0 "$@" | grep -E "/($name)/" | train &
        done
        for pid in $(jobs -p); do wait "$pid" || failed=1; done
    fi
    for seed in $seeds; do
        cells "$seed" "$@" | train &
        [ $parallel != 1 ] || wait $! || failed=1
    done
    for pid in $(jobs -p); do wait "$pid" || failed=1; done
    for block in $(find $dir -type d -name T1); do  # runs that T2 and T4 have in common with T1
        cp -r "$block/rslad/." "$block/../T2" || failed=1
        for name in at trades; do
            mkdir -p "$block/../T4/$name"
            cp -r "$block/$name/plain" "$block/../T4/$name" || failed=1
        done
    done
    mkdir -p $dir/published
    case $dir in
        */paper) cp -r results/published/*/ $dir/published ;;
        */cpu | */gpu) cp -r results/published/cifar10-resnet18 $dir/published ;;
    esac
    $PY infoard.py tables $dir
    return $failed
}

# Does InfoARD lift its bases, by which part, and with which teacher: the protocol of results/evidence
TEACHERS="
teachers/strong   --student wrn_10_1 --framework trades --epochs 10 --lr 0.2
teachers/medium   --student tiny_wide --framework trades --epochs 12
teachers/weak     --student tiny_wide --framework trades --epochs 2
teachers/self     --student tiny --framework trades --epochs 3
teachers/natural  --student tiny_wide --framework natural --epochs 4
teachers/strong32 --student wrn_10_1 --framework trades --epochs 10 --lr 0.2 --image-size 32"

CONTROLS="
controls/plain     --no-infoard
controls/infoard
controls/asa       --mim off
controls/uniform   --mim off --asa uniform
controls/radii2    --mim off --lam-hi 2
controls/shuffled  --mim off --asa shuffled
controls/reversed  --mim off --lam-lo 1.5 --lam-hi 1
controls/features  --asa off
controls/unpaired  --asa off --mim unpaired
controls/matching  --asa off --mim vid
controls/attention --asa off --w-feat 0 --w-att 0.05
controls/relation  --asa off --mim off --w-rel 0.1
controls/steps     --steps-lo 1
controls/longer    --no-infoard --epochs 4"

FIRST="
first/plain    --no-infoard
first/infoard  --lam-hi 2
first/asa      --mim off --lam-hi 2
first/uniform  --mim off --asa uniform --lam-hi 2
first/features --asa off"

lifted() {  # NAME OPTIONS: the two lines of a base, plain and with InfoARD
    local name=$1; shift
    echo "$name/plain $* --no-infoard"
    echo "$name/infoard $*"
}

look() {  # RUN IMAGES ATTACKS: eval.json of a finished run, once
    [ ! $1/eval.json -nt $1/last.pt ] || return 0
    $PY infoard.py eval $1/last.pt --out $1 --eval-subset $2 --attacks $3 & wait $!
}

evidence() {  # [first] [options for every run]
    local dir=runs/evidence seeds=77 name cells failed=0 part=""
    [ "${1:-}" != first ] || { part=first; shift; }
    local nets=$dir/teachers same="--image-size 16 --no-figures --no-progress"
    local short="$same --steps 3 --step-size 4/255" long="$same --steps 5"
    local student="--student tiny --lr 0.4 --val-size 0 --eval-subset 0"
    local kinds=noise,shot,impulse,blur,bright,contrast,pixelate,jpeg
    if [ $part ]; then
        local common="$long --no-infoard --attacks clean,pgd,apgd --eval-subset 2000"
        grid "teachers/first --student wrn_10_2 --framework trades --epochs 20" "$@"
        common="$long $student --epochs 5 --teacher $nets/first/s77/best.pt
                --attacks clean,fgsm,pgd,cw,apgd,pgd_l2,corrupt" seeds="0 1 2"
        grid "$FIRST" "$@" || failed=1
    else
        local common="$short --no-infoard --attacks clean,pgd,apgd --eval-subset 2000"
        grid "$TEACHERS" "$@"
        common="$short $student --epochs 3 --teacher-nat $nets/natural/s77/last.pt
                --attacks clean,fgsm,pgd_sat,cw,pgd_l2" seeds="0 1 2"
        cells=$(sed "s|$| --teacher $nets/strong/s77/last.pt|" <<< "${CONTROLS#?}"
            while read -r name _; do  # the same radii for all
                [ $name = rslad ] || lifted T1/$name --lam-hi 1.5 --framework $name --teacher $nets/strong/s77/last.pt
            done <<< "${PAPERS#?}"
            for name in adaad/radii2 adaad/radii3 igdm/radii2; do
                echo "T1/$name --lam-hi ${name: -1} --framework ${name%/*} --teacher $nets/strong/s77/last.pt"
            done
            for name in at trades; do  # longer than InfoARD takes, whose teacher they lack
                echo "T1/$name/longer --framework $name --no-infoard --epochs 6"
            done
            for name in medium weak self; do
                lifted teacher/$name --teacher $nets/$name/s77/last.pt
            done
            for name in asa uniform; do
                echo "adaad/$name --framework adaad --mim off --asa ${name/asa/teacher} --lam-hi 2 --teacher $nets/strong/s77/last.pt"
            done
            for name in rslad adaad; do
                lifted longer/$name --framework $name --epochs 12 --teacher $nets/strong/s77/last.pt
            done
            lifted size32/rslad --image-size 32 --teacher $nets/strong32/s77/last.pt)
        grid "$cells" "$@" || failed=1
        seeds="3 4 5"  # for the contrast that three seeds left open
        grid "$(grep ^adaad/ <<< "$cells")" "$@" || failed=1
        for name in T1/rslad teacher/strong attacks; do
            mkdir -p $dir/$name
            cp -a $dir/controls/{plain,infoard} $dir/$name || failed=1
        done
        cp -a $dir/T1/adaad/{plain,radii2} $dir/adaad || failed=1
        for name in $dir/T1/*/*/s0; do  # does APGD see what CW does not?
            look $name 500 clean,pgd_sat,cw,apgd || failed=1
        done
        for name in $dir/attacks/*/s?; do
            look $name 5000 clean,apgd,corrupt,$kinds || failed=1
        done
        for name in $dir/longer/*/*/s?; do
            look $name 2000 clean,pgd_sat,cw,apgd || failed=1
        done
        for name in $dir/size32/*/*/s?; do
            look $name 1000 clean,pgd_sat,cw,apgd || failed=1
        done
    fi
    for name in ${part:-T1 controls teacher attacks adaad longer size32}; do
        $PY infoard.py compare $dir/$name || failed=1
    done
    [ -z $part ] || $PY infoard.py attention $dir/first --eval-subset 2000 || failed=1
    return $failed
}

# what accuracy costs what time: attack steps, 1 to so many by rank, full and half precision
LITE="
k1      --steps 1 --step-size 8/255
k2      --steps 2 --step-size 6/255
k2-1    --steps 2 --step-size 6/255 --steps-lo 1
k3-1    --steps 3 --step-size 4/255 --steps-lo 1
k5      --steps 5
k5-1    --steps 5 --steps-lo 1
k10     --steps 10
k10-1   --steps 10 --steps-lo 1
k5fp32  --steps 5 --amp off
plain5      --steps 5 --no-infoard
plain5fp32  --steps 5 --no-infoard --amp off
plain10     --steps 10 --no-infoard"

grid() {  # LINES [options for every run]: the runs NAME OPTIONS of $dir, two at once, seed by seed
    local lines=$1 name options seed pid half more="" failed=0; shift
    [ $# = 0 ] || more=$(printf '%q ' "$@")
    set -m
    trap 'for pid in $(jobs -p); do kill -- -$pid; done; wait; exit 130' INT TERM
    for half in 0 1; do
        for seed in $seeds; do
            while read -r name options; do
                [ -z "$name" ] || echo $common "$options --seed $seed --out $dir/$name/s$seed $more"
            done <<< "$lines"
        done | awk "NR % 2 == $half" | OMP_NUM_THREADS=1 train &
    done
    for pid in $(jobs -p); do wait "$pid" || failed=1; done
    return $failed
}

lite() {  # [options for every run]
    local dir=runs/lite seeds=0 name options failed=0
    local common="--subset 10000 --no-figures --no-progress"
    grid "teacher --student tiny_wide --framework trades --epochs 20 --steps 5 --attacks clean,pgd" "$@"
    common="$common --teacher $dir/teacher/s0/best.pt --student tiny --epochs 10 --eval-subset 2000"
    seeds="0 1 2"
    grid "$LITE" "$@" || failed=1
    while read -r name options; do  # alone on the machine
        $PY infoard.py bench --framework rslad --student tiny --teacher-arch tiny_wide \
            --batch-size 128 $options --out $dir/$name "$@" || failed=1
    done <<< "${LITE#?}"
    $PY infoard.py curve $dir
    return $failed
}

case "${1:-}" in
    demo) setup; demo ;;
    test) setup; shift; $PY -m pytest -q test_infoard.py "$@" ;;
    tables) scale "${2:-}"; shift 2; setup; tables "$@" ;;
    lite) shift; setup; lite "$@" ;;
    evidence) shift; setup; evidence "$@" ;;
    cells) scale "${2:-}"; shift 2; for seed in $seeds; do cells "$seed" "$@"; done ;;
    *) sed -n '2,13s/^# //p' "$0"; exit 2 ;;
esac
