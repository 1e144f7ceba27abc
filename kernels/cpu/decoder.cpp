// qk_decode: see qkit_decoder.h. Everything between the linears; those are qk_matmul and qk_dense.
#include "qkit_decoder.h"

#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "lanes.h"
#include "pool.h"
#include "sizes.h"

using namespace qkit;

// Compiled for three levels of x86 and chosen by the loader; by GCC before 12, which does not know the levels' names, for
// their main features. Elsewhere once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__) && !defined(__SANITIZE_ADDRESS__)
#if __GNUC__ >= 12
#define QK_LEVELS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QK_LEVELS __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define QK_LEVELS
#endif

namespace {

typedef float V __attribute__((vector_size(64), aligned(4)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32), aligned(2)));

// By reference: a vector wider than the baseline's registers has no agreed way to be passed.
QK_INLINE void widen(const uint16_t* x, V& to) {
    H h;
    std::memcpy(&h, x, sizeof h);
    const U u = __builtin_convertvector(h, U) << 16;
    std::memcpy(&to, &u, sizeof u);
}
QK_INLINE void load(const float* x, V& to) { std::memcpy(&to, x, sizeof to); }
QK_INLINE void store(float* to, const V& x) { std::memcpy(to, &x, sizeof x); }
QK_INLINE float sum(const V& x) {
    float f[LANES];
    store(f, x);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) f[i] += f[i + half];
    return f[0];
}
QK_INLINE float widen1(uint16_t h) { return BF16::get(&h); }
QK_INLINE uint16_t narrow1(float x) { return to_bf16(x); }

QK_LEVELS void narrow(const float* x, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = narrow1(x[i]);
}

// e**x within 2 units in the last place; 0 below -87.
QK_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = x * 1.44269504f + MAGIC;  // an integer, kept in the low bits
    const float r = x - (n - MAGIC) * 0.693145752f - (n - MAGIC) * 1.42860677e-6f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665795e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float((as_bits(n) - as_bits(MAGIC) + 127u) << 23);
}

// to = act(gate) * up, from bfloat16 to bfloat16.
QK_LEVELS void gated(const uint16_t* gate, const uint16_t* up, uint16_t* to, int64_t n, int activation) {
    if (activation == QK_SILU) {
        for (int64_t i = 0; i < n; ++i) {
            const float g = widen1(gate[i]);
            to[i] = narrow1(widen1(narrow1(g / (1.0f + exponential(-g)))) * widen1(up[i]));
        }
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const float g = widen1(gate[i]), t = 1.5957691216f * (g + 0.044715f * g * g * g);
            to[i] = narrow1(widen1(narrow1(g / (1.0f + exponential(-t)))) * widen1(up[i]));
        }
    }
}

// x / rms(x) * (weight + offset)
QK_LEVELS void rms_norm(const float* x, const uint16_t* weight, float offset, float* to, int64_t n, float epsilon) {
    float lanes[LANES] = {};
    const int64_t whole = n / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; ++k) lanes[k] += x[i + k] * x[i + k];
    float total = 0.0f;
    for (int k = 0; k < LANES; ++k) total += lanes[k];
    for (int64_t i = whole; i < n; ++i) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / (float)n + epsilon);
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * scale * (widen1(weight[i]) + offset);
}

// Rows begin .. end of w [rows, cols] times M vectors x (float [M, cols], cols a multiple of 16 after padding).
template <int M>
QK_INLINE void dense_rows(const uint16_t* w, const float* x, const uint16_t* bias, uint16_t* out, int64_t begin,
                          int64_t end, int64_t rows, int64_t cols, int64_t stride) {
    for (int64_t r = begin; r < end; ++r) {
        const uint16_t* row = w + r * cols;
        V a[M][2] = {};
        int64_t i = 0;
        for (; i + 2 * LANES <= cols; i += 2 * LANES) {
            V w0, w1, x0, x1;
            widen(row + i, w0);
            widen(row + i + LANES, w1);
            for (int m = 0; m < M; ++m) {
                load(x + m * stride + i, x0);
                load(x + m * stride + i + LANES, x1);
                a[m][0] += w0 * x0;
                a[m][1] += w1 * x1;
            }
        }
        for (int m = 0; m < M; ++m) {
            float y = sum(a[m][0] + a[m][1]);
            for (int64_t k = i; k < cols; ++k) y += widen1(row[k]) * x[m * stride + k];
            out[m * rows + r] = narrow1(y + (bias ? widen1(bias[r]) : 0.0f));
        }
    }
}
QK_LEVELS void dense1(const uint16_t* w, const float* x, const uint16_t* bias, uint16_t* out, int64_t begin, int64_t end,
                      int64_t rows, int64_t cols, int64_t stride) {
    dense_rows<1>(w, x, bias, out, begin, end, rows, cols, stride);
}
QK_LEVELS void dense4(const uint16_t* w, const float* x, const uint16_t* bias, uint16_t* out, int64_t begin, int64_t end,
                      int64_t rows, int64_t cols, int64_t stride) {
    dense_rows<4>(w, x, bias, out, begin, end, rows, cols, stride);
}

struct Head {
    const float* q;  // [group][dim]
    const uint16_t *keys, *values;
    int64_t group, dim, begin, end;
    float *scores, *out;  // scratch [group][end - begin]; out [group][dim]
};

// Softmax attention of one key-value head and the queries that share it.
QK_LEVELS void attend(const Head& h) {
    const int64_t n = h.end - h.begin, dim = h.dim;
    for (int64_t t = 0; t < n; ++t) {
        const uint16_t* key = h.keys + (h.begin + t) * dim;
        for (int64_t g = 0; g < h.group; ++g) {
            const float* q = h.q + g * dim;
            V a = {};
            int64_t i = 0;
            for (; i + LANES <= dim; i += LANES) {
                V k, x;
                widen(key + i, k);
                load(q + i, x);
                a += k * x;
            }
            float s = sum(a);
            for (; i < dim; ++i) s += widen1(key[i]) * q[i];
            h.scores[g * n + t] = s;
        }
    }
    for (int64_t g = 0; g < h.group; ++g) {
        float* s = h.scores + g * n;
        float most = s[0];
        for (int64_t t = 1; t < n; ++t) most = s[t] > most ? s[t] : most;
        for (int64_t t = 0; t < n; ++t) s[t] = exponential(s[t] - most);
        float total = 0.0f;
        for (int64_t t = 0; t < n; ++t) total += s[t];
        for (int64_t t = 0; t < n; ++t) s[t] /= total;
        float* out = h.out + g * dim;
        std::memset(out, 0, (size_t)dim * sizeof(float));
        for (int64_t t = 0; t < n; ++t) {
            const uint16_t* value = h.values + (h.begin + t) * dim;
            const float weight = s[t];
            for (int64_t i = 0; i < dim; ++i) out[i] += weight * widen1(value[i]);
        }
    }
}

// In place: the halves of x rotated.
QK_LEVELS void rotate(float* x, const float* cosine, const float* sine, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

QK_LEVELS void add(float* x, const uint16_t* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] += widen1(y[i]);
}
QK_LEVELS void widen_all(const uint16_t* x, float* to, int64_t n, float scale) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen1(x[i]) * scale;
}

struct Step {
    const QkDecoder& d;
    int64_t batch, capacity, length;
    const int64_t *positions, *first;
    int isa, nthreads;
    std::vector<float> x, normed, q, attended, scores;
    std::vector<uint16_t> half, q_half, k_half, v_half, gate, up;

    int linear(const QkLinear& l, const uint16_t* in, uint16_t* out) const {
        if (l.dense) return qk_dense(l.dense, in, l.bias, out, batch, l.rows, l.cols, nthreads);
        return qk_matmul(&l.quantized, in, QK_BF16, l.bias, out, batch, 0, isa, nthreads);
    }

    // half = norm(x), for the linears that follow.
    void norm(const uint16_t* weight) {
        for (int64_t b = 0; b < batch; ++b)
            rms_norm(x.data() + b * d.hidden, weight, d.norm_offset, normed.data() + b * d.hidden, d.hidden, d.epsilon);
        narrow(normed.data(), half.data(), batch * d.hidden);
    }

    // x += y, y normed first where the architecture does.
    void residual(const uint16_t* y, const uint16_t* post_norm) {
        for (int64_t b = 0; b < batch; ++b) {
            float* to = x.data() + b * d.hidden;
            if (!post_norm) {
                add(to, y + b * d.hidden, d.hidden);
                continue;
            }
            float* t = normed.data();
            widen_all(y + b * d.hidden, t, d.hidden, 1.0f);
            rms_norm(t, post_norm, d.norm_offset, t, d.hidden, d.epsilon);
            for (int64_t i = 0; i < d.hidden; ++i) to[i] += t[i];
        }
    }

    // One head of queries or keys: bfloat16 -> normed and rotated float.
    void turn(const uint16_t* from, float* to, const uint16_t* weight, const QkLayer& layer, int64_t position) const {
        const int64_t half_dim = d.head_dim / 2;
        widen_all(from, to, d.head_dim, 1.0f);
        if (weight) rms_norm(to, weight, d.norm_offset, to, d.head_dim, d.epsilon);
        rotate(to, layer.cosine + position * half_dim, layer.sine + position * half_dim, half_dim);
    }

    int attention(const QkLayer& layer, const QkCache& cache) {
        const int64_t dim = d.head_dim, group = d.heads / d.kv_heads;
        int status;
        if ((status = linear(layer.q, half.data(), q_half.data()))) return status;
        if ((status = linear(layer.k, half.data(), k_half.data()))) return status;
        if ((status = linear(layer.v, half.data(), v_half.data()))) return status;
        auto heads = [&](int64_t begin, int64_t end) {
            float key[1024];
            for (int64_t item = begin; item < end; ++item) {
                const int64_t b = item / d.kv_heads, h = item % d.kv_heads;
                const int64_t slot = (b * d.kv_heads + h) * capacity;
                turn(k_half.data() + item * dim, key, layer.k_norm, layer, positions[b]);
                narrow(key, cache.keys + (slot + length) * dim, dim);
                std::memcpy(cache.values + (slot + length) * dim, v_half.data() + item * dim, (size_t)dim * 2);
                float* queries = q.data() + item * group * dim;
                for (int64_t g = 0; g < group; ++g) {
                    float* one = queries + g * dim;
                    turn(q_half.data() + (item * group + g) * dim, one, layer.q_norm, layer, positions[b]);
                    for (int64_t i = 0; i < dim; ++i) one[i] = widen1(narrow1(one[i])) * d.attention_scale;
                }
                const int64_t oldest = layer.window && length + 1 > layer.window ? length + 1 - layer.window : 0;
                attend(Head{queries, cache.keys + slot * dim, cache.values + slot * dim, group, dim,
                            first[b] > oldest ? first[b] : oldest, length + 1,
                            scores.data() + item * group * (length + 1), attended.data() + item * group * dim});
            }
        };
        // A piece is worth a thread when it reads some 32 KiB of keys and values.
        const int64_t bytes = 4 * dim * least(length + 1, layer.window ? layer.window : length + 1);
        over(batch * d.kv_heads, bytes < 32768 ? 32768 / bytes : 1, nthreads, heads);
        narrow(attended.data(), q_half.data(), batch * d.heads * dim);
        if ((status = linear(layer.o, q_half.data(), half.data()))) return status;
        residual(half.data(), layer.attention_post_norm);
        return QK_OK;
    }

    int mlp(const QkLayer& layer) {
        int status;
        if ((status = linear(layer.gate, half.data(), gate.data()))) return status;
        if ((status = linear(layer.up, half.data(), up.data()))) return status;
        auto body = [&](int64_t begin, int64_t end) {
            gated(gate.data() + begin, up.data() + begin, gate.data() + begin, end - begin, d.activation);
        };
        over(batch * d.intermediate, 8192, nthreads, body);
        if ((status = linear(layer.down, gate.data(), half.data()))) return status;
        residual(half.data(), layer.mlp_post_norm);
        return QK_OK;
    }

    int run(const QkCache* caches, const int64_t* tokens, uint16_t* logits) {
        x.resize((size_t)(batch * d.hidden));
        normed.resize(x.size());
        half.resize(x.size());
        q.resize((size_t)(batch * d.heads * d.head_dim));
        attended.resize(q.size());
        q_half.resize(q.size());
        k_half.resize((size_t)(batch * d.kv_heads * d.head_dim));
        v_half.resize(k_half.size());
        gate.resize((size_t)(batch * d.intermediate));
        up.resize(gate.size());
        scores.resize((size_t)(batch * d.heads * (length + 1)));
        for (int64_t b = 0; b < batch; ++b) {
            widen_all(d.embedding + tokens[b] * d.hidden, x.data() + b * d.hidden, d.hidden, 1.0f);
            if (d.embedding_scale != 1.0f)  // in bfloat16, as the model would
                for (int64_t i = 0; i < d.hidden; ++i) {
                    float& value = x[(size_t)(b * d.hidden + i)];
                    value = widen1(narrow1(value * d.embedding_scale));
                }
        }
        for (int64_t l = 0; l < d.n_layers; ++l) {
            const QkLayer& layer = d.layers[l];
            norm(layer.attention_norm);
            if (const int status = attention(layer, caches[l])) return status;
            norm(layer.mlp_norm);
            if (const int status = mlp(layer)) return status;
        }
        norm(d.final_norm);
        return linear(d.head, half.data(), logits);
    }
};

bool whole(const QkLinear& l, int64_t rows, int64_t cols) {
    return l.rows == rows && l.cols == cols && (l.dense || (l.quantized.rows == rows && l.quantized.cols == cols));
}

int check(const QkDecoder& d) {
    if (d.n_layers < 1 || d.hidden < 1 || d.heads < 1 || d.kv_heads < 1 || d.heads % d.kv_heads || d.head_dim < 2 ||
        d.head_dim % 2 || d.head_dim > 1024 || d.intermediate < 1 || d.vocabulary < 1)
        return QK_BAD_SHAPE;
    if (!d.layers || !d.embedding || !d.final_norm) return QK_NULL;
    if (!whole(d.head, d.vocabulary, d.hidden)) return QK_BAD_SHAPE;
    const int64_t q = d.heads * d.head_dim, kv = d.kv_heads * d.head_dim;
    for (int64_t i = 0; i < d.n_layers; ++i) {
        const QkLayer& l = d.layers[i];
        if (!l.attention_norm || !l.mlp_norm || !l.cosine || !l.sine) return QK_NULL;
        if (!whole(l.q, q, d.hidden) || !whole(l.k, kv, d.hidden) || !whole(l.v, kv, d.hidden) ||
            !whole(l.o, d.hidden, q) || !whole(l.gate, d.intermediate, d.hidden) ||
            !whole(l.up, d.intermediate, d.hidden) || !whole(l.down, d.hidden, d.intermediate) || l.window < 0)
            return QK_BAD_SHAPE;
    }
    return QK_OK;
}

}  // namespace

int qk_dense(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m, int64_t rows,
             int64_t cols, int nthreads) {
    if (m < 0 || rows < 1 || cols < 1) return QK_BAD_SHAPE;
    if (!w || !x || !out) return QK_NULL;
    static thread_local std::vector<float> wide;
    try {
        wide.resize((size_t)((m + 3) / 4 * 4 * cols));
    } catch (const std::bad_alloc&) {
        return QK_NO_MEMORY;
    }
    widen_all(x, wide.data(), m * cols, 1.0f);
    const float* in = wide.data();
    auto body = [&](int64_t begin, int64_t end) {
        int64_t b = 0;
        for (; b + 4 <= m; b += 4) dense4(w, in + b * cols, bias, out + b * rows, begin, end, rows, cols, cols);
        for (; b < m; ++b) dense1(w, in + b * cols, bias, out + b * rows, begin, end, rows, cols, cols);
    };
    const int64_t piece = 131072 / cols;
    over(rows, piece > 1 ? piece : 1, nthreads, body);
    return QK_OK;
}

int qk_decode(const QkDecoder* decoder, const QkCache* caches, int64_t batch, int64_t capacity, int64_t length,
              const int64_t* tokens, const int64_t* positions, const int64_t* first, uint16_t* logits, int isa,
              int nthreads) {
    if (!decoder || !caches || !tokens || !positions || !first || !logits) return QK_NULL;
    if (const int bad = check(*decoder)) return bad;
    if (batch < 1 || length < 0 || length >= capacity) return QK_BAD_SHAPE;
    for (int64_t b = 0; b < batch; ++b)
        if (tokens[b] < 0 || tokens[b] >= decoder->vocabulary || positions[b] < 0 || first[b] < 0 || first[b] > length)
            return QK_BAD_SHAPE;
    const OwnThreads threads;
    try {
        Step step{*decoder, batch, capacity, length, positions, first, isa, nthreads, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
        return step.run(caches, tokens, logits);
    } catch (const std::bad_alloc&) {
        return QK_NO_MEMORY;
    }
}
