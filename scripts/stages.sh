# Sourced by the recipes: runs the four stages on NUM_MACHINES machines with NUM_GPUS processes each (one for each GPU;
# CPU processes where there is no GPU). quickstart.sh uses only `run` and `choose_generate`.
# Reads GENERATE, MODEL, DATA, LOG_DIR, the arrays PROMPTS, RUN, SCORES, ANALYSIS, and the variables below.

NUM_GPUS=${NUM_GPUS:-8}            # processes per machine
NUM_MACHINES=${NUM_MACHINES:-1}    # each starts the same recipe, on a shared file system
MACHINE_RANK=${MACHINE_RANK:-0}    # 0 on the first machine
MAIN_IP=${MAIN_IP:-127.0.0.1}      # the first machine's address
MAIN_PORT=${MAIN_PORT:-29500}

run() {
    echo "+ $*"
    [ -n "${DRY_RUN:-}" ] || "$@"
}

# Sets GENERATE for MODEL: generate.py where the model has no chat template
choose_generate() {
    GENERATE=generate_llama3.py
    [ -n "${DRY_RUN:-}" ] \
        || python -c 'import sys; from logra.models.model import load_tokenizer as load; sys.exit(not load(sys.argv[1]).chat_template)' "$MODEL" \
        || GENERATE=generate.py
}

launch() {
    local flags=(--config_file scripts/accelerate.yaml --num_processes $((NUM_GPUS * NUM_MACHINES))
        --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_IP"
        --main_process_port "$MAIN_PORT")
    [ $((NUM_GPUS * NUM_MACHINES)) = 1 ] || flags+=(--multi_gpu)
    run accelerate launch "${flags[@]}" "$@"
}

# stages [more flags of extract_log.py]
stages() {
    [ -n "${DRY_RUN:-}" ] || source scripts/venv.sh
    [ "$MACHINE_RANK" != 0 ] || run python "$GENERATE" --model_name "$MODEL" "${PROMPTS[@]}"
    launch extract_log.py --log_dir "$LOG_DIR" --model_name "$MODEL" --data_name "$DATA" "${RUN[@]}" "$@"
    launch compute_influence.py --log_dir "$LOG_DIR" "${SCORES[@]}"
    [ "$MACHINE_RANK" != 0 ] || run python analysis.py --log_dir "$LOG_DIR" "${ANALYSIS[@]}"
}
