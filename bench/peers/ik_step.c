// Times steps of ik_llama.cpp through its public C interface: a line per run, its seconds and
// the share of the cores' time that it had.
//
// Its own llama-bench asks for the logits of one token, so that the last layer's experts see one token
// only, and has no batch of sequences. Compiled by ik_llama.py against the user's checkout.

#include "llama.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void quiet(enum ggml_log_level level, const char * text, void * data) {
    (void) level, (void) text, (void) data;
}

// Distinct ids where the vocabulary allows: repeated tokens go to the same experts, which flatters.
static void draw(int * ids, int count, int * deck, int vocab) {
    for (int i = 0; i < count; i++) {
        int at = i % vocab, other = at + rand() % (vocab - at);
        int id = deck[other];
        deck[other] = deck[at];
        ids[i] = deck[at] = id;
    }
}

static void put(struct llama_batch * batch, int id, int position, int sequence, bool logits) {
    int i = batch->n_tokens++;
    batch->token[i] = id;
    batch->pos[i] = position;
    batch->n_seq_id[i] = 1;
    batch->seq_id[i][0] = sequence;
    batch->logits[i] = logits;
}

static double step(struct llama_context * ctx, struct llama_batch batch) {
    double start = now(CLOCK_MONOTONIC);
    int status = llama_decode(ctx, batch);
    llama_synchronize(ctx);
    if (status) {
        fprintf(stderr, "llama_decode: status %d\n", status);
        exit(1);
    }
    return now(CLOCK_MONOTONIC) - start;
}

int main(int argc, char ** argv) {
    if (argc != 14) {
        fprintf(stderr, "usage: ik_step FILE prefill|decode COUNT THREADS WARMUP RUNS PATIENCE UBATCH MMAP REPACK MLA"
                        " ALL_LOGITS VERBOSE\n");
        return 2;
    }
    bool prefill = !strcmp(argv[2], "prefill");
    int count = atoi(argv[3]), threads = atoi(argv[4]), warmup = atoi(argv[5]), runs = atoi(argv[6]);
    int patience = atoi(argv[7]), ubatch = atoi(argv[8]), mla = atoi(argv[11]), past = 8;
    bool mmap = atoi(argv[9]), repack = atoi(argv[10]), all_logits = atoi(argv[12]), verbose = atoi(argv[13]);
    if (!verbose) llama_log_set(quiet, NULL);
    llama_backend_init();

    struct llama_model_params load = llama_model_default_params();
    load.n_gpu_layers = 0;
    load.use_mmap = mmap;
    load.repack_tensors = repack;
    load.use_thp = !mmap; // Huge pages for the copy, of which there is one only without the map.
    load.mla = mla;
    struct llama_model * model = llama_model_load_from_file(argv[1], load);
    if (!model) return fprintf(stderr, "%s: not loaded\n", argv[1]), 1;

    int sequences = prefill ? 1 : count, most = prefill ? count : count * past;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = prefill ? count : sequences * 256;
    params.n_batch = most < 32 ? 32 : most;
    params.n_ubatch = ubatch;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    params.flash_attn = true;
    params.mla_attn = mla;
    params.fused_moe_up_gate = true;
    params.fused_up_gate = true;
    params.graph_reuse = true;
    struct llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) return fprintf(stderr, "%s: no context\n", argv[1]), 1;
    fprintf(stderr, "%s\n", llama_print_system_info());

    int vocab = llama_n_vocab(model), * ids = malloc(most * sizeof(int)), * deck = malloc(vocab * sizeof(int));
    for (int i = 0; i < vocab; i++) deck[i] = i;
    srand(1);
    struct llama_batch batch = llama_batch_init(most, 0, 1);
    if (!prefill) {
        draw(ids, most, deck, vocab);
        for (int s = 0; s < sequences; s++)
            for (int p = 0; p < past; p++) put(&batch, ids[s * past + p], p, s, p == past - 1);
        step(ctx, batch);
    }
    int fair = 0;
    double until = now(CLOCK_MONOTONIC) + patience;
    for (int run = 0; run < warmup + runs || (fair < runs && now(CLOCK_MONOTONIC) < until); run++) {
        batch.n_tokens = 0;
        draw(ids, count, deck, vocab);
        // The same past before every run.
        if (prefill) llama_kv_cache_clear(ctx);
        else llama_kv_cache_seq_rm(ctx, -1, past, -1);
        for (int i = 0; i < count; i++) {
            if (prefill) put(&batch, ids[i], i, 0, all_logits || i == count - 1);
            else put(&batch, ids[i], past, i, true);
        }
        double cpu = now(CLOCK_PROCESS_CPUTIME_ID), seconds = step(ctx, batch);
        double share = (now(CLOCK_PROCESS_CPUTIME_ID) - cpu) / seconds / threads;
        if (run < warmup) continue;
        fair += share >= 0.95;
        printf("step %.9f %.4f\n", seconds, share);
    }
    const float * logits = llama_get_logits_ith(ctx, batch.n_tokens - 1);
    for (int i = 0; i < vocab; i++)
        if (!(logits[i] > -1e4f && logits[i] < 1e4f)) return fprintf(stderr, "logits are not finite\n"), 1;
    return 0;
}
