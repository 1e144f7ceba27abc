// One decoding step of a whole decoder-only transformer in one call, or a piece of a prompt. What separates the matmuls from tokens per second
// on a small model is not arithmetic but the hundreds of small operations between them, each dispatched from Python.
//
// The architecture is the common one: RMS norm, grouped-query attention with rotary embeddings (halves rotated), a gated
// MLP; optional biases, norms of queries and keys, norms after attention and MLP, sliding windows. Activations are float
// between linears and bfloat16 going into and coming out of them, as the model would run in bfloat16.
#pragma once
#include "qkit_cpu.h"

// y = x @ weight.T + bias. dense: bfloat16 [rows, cols], or null: `quantized`, in whose rows and cols the shape is too.
struct QkLinear {
    QkWeight quantized;
    const uint16_t* dense;
    const uint16_t* bias;  // bfloat16 [rows] or null
    int64_t rows, cols;
    int int8;  // quantized: its inputs are quantized to int8, per sequence
};

// Norms are bfloat16, the model's own: read at every step, so that writes to them count. Null: the architecture has none
// there.
struct QkLayer {
    QkLinear q, k, v, o, gate, up, down;
    const uint16_t *attention_norm, *attention_post_norm, *mlp_norm, *mlp_post_norm;  // [hidden]
    const uint16_t *q_norm, *k_norm;                                                  // [head_dim]
    const float *cosine, *sine;  // [positions][head_dim / 2]
    int64_t window;              // positions a query sees, its own included; 0: all
};

enum QkActivation { QK_SILU = 0, QK_GELU_TANH = 1 };

struct QkDecoder {
    const QkLayer* layers;
    int64_t n_layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
    const uint16_t* embedding;  // bfloat16 [vocabulary, hidden]
    const uint16_t* final_norm;
    QkLinear head;
    float embedding_scale, attention_scale, epsilon, norm_offset;  // norm_offset: added to every norm's weight
    int activation;  // QkActivation
};

// Keys and values of one layer: bfloat16 [batch][kv_heads][capacity][head_dim]. Entry t of a sequence (start <= t < length)
// lies in slot t - start: a layer with a window drops what no query can see any more, and moves the rest to the front.
struct QkCache {
    uint16_t *keys, *values;
    int64_t capacity, start;
};

// Appends tokens[b] of each of `batch` (at most 32) sequences as entry `length` of the caches, which have a slot for it and
// hold what it sees, and writes the logits of the next token, bfloat16 [batch, vocabulary]. positions[b]: where the rotary
// tables are read. first[b]: the first entry that sequence b may see (padding lies before it).
QK_API int qk_decode(const QkDecoder* decoder, const QkCache* caches, int64_t batch, int64_t length, const int64_t* tokens,
                     const int64_t* positions, const int64_t* first, uint16_t* logits, int isa, int nthreads);

// Appends n (at most 240) tokens of one sequence as entries `length` .. of its caches, which have slots for them and hold what
// the first of them sees, and writes the logits of the token after the last, bfloat16 [vocabulary], unless `logits` is null.
// positions[n]; first: the first entry that any of them may see. head_dim: a multiple of 8, at most 256.
QK_API int qk_prompt(const QkDecoder* decoder, const QkCache* caches, int64_t n, int64_t length, const int64_t* tokens,
                     const int64_t* positions, int64_t first, uint16_t* logits, int isa, int nthreads);

// out [m, rows] = x [m, cols] @ w [rows, cols].T, all bfloat16, float accumulation: the dense linears of qk_decode.
QK_API int qk_dense(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m, int64_t rows,
                    int64_t cols, int nthreads);
