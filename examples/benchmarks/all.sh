#!/bin/sh
# Every benchmark, those that say most first, each with a time budget.
#   examples/benchmarks/all.sh [NAME ...]     flash paged prefill writes training serving claims io layout ring
#                                             quantized compile configs
# PYTHON: the interpreter (python3). RESULTS: the folder that is written to.
cd "$(dirname "$0")/../.." || exit 1
wanted=${*:-flash paged prefill writes training serving claims io layout ring quantized compile configs}
results=${RESULTS:-examples/benchmarks/results}
export PYTHONPATH=".:$PYTHONPATH"
mkdir -p "$results" || exit 1
summary="" failed=0

# run NAME SECONDS SCRIPT RESULT [arguments]: what does not stop by itself is stopped
run() {
    name=$1 seconds=$2 script=$3 result=$4 start=$(date +%s)
    shift 4
    case " $wanted " in *" $name "*) ;; *) return ;; esac
    echo "== $name: $script, at most $seconds s"
    timeout -k 20 "$((seconds + 40))" "${PYTHON:-python3}" "examples/benchmarks/$script" --out "$results/$result" "$@"
    code=$?
    [ $code -eq 0 ] || failed=1
    summary="$summary$(printf '%-10s %5d s  exit code %d' "$name" $(($(date +%s) - start)) $code)
"
}

known=" flash paged prefill writes training serving claims io layout ring quantized compile configs "
for name in $wanted; do
    case "$known" in *" $name "*) ;; *) echo "all.sh: no benchmark $name among$known" >&2 && exit 2 ;; esac
done
run flash 480 flash_attention.py flash_attention.json --no-claims --processes 2 --max-seconds 480 \
    --plot "$results/flash_attention.png"
run paged 340 paged_attention.py paged_attention.json --page-size 16 8 64 128 --max-seconds 340 \
    --plot "$results/paged_attention.png"
run prefill 190 paged_prefill.py paged_prefill.json --max-seconds 160
run writes 150 page_writes.py page_writes.json --max-seconds 120
run training 240 training.py training.json --max-seconds 150
run serving 300 serving.py serving.json --max-seconds 200
run claims 260 flash_attention.py flash_attention.json --only-claims --max-seconds 260 \
    --plot "$results/flash_attention.png"
run io 150 flash_io.py flash_io.json --max-seconds 150
run layout 120 page_layout.py page_layout.json --max-seconds 100
if [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -gt 1 ]; then
    run ring 200 ring_attention.py ring_attention.json --max-seconds 150
fi
run quantized 200 quantized_pages.py quantized_pages.json
run configs 200 decode_configs.py decode_configs.json --max-seconds 180
run compile 120 compile_time.py compile_time.json --max-seconds 100
printf '\n%s' "$summary"
exit $failed
