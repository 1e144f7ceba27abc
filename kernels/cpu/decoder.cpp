// qk_decode, qk_prompt: see qkit_decoder.h. The program of a step, which all threads of a team run (team.h): what lies
// between the linears is step.h's and prompt.h's, the linears are products in parts (product.h).
#include "qkit_decoder.h"

#include <cmath>
#include <cstring>
#include <new>

#include "linears.h"
#include "step_types.h"
#include "team.h"

using namespace qkit;

namespace {

constexpr int64_t MOST_BATCH = 32;
constexpr int64_t MOST_PROMPT = 240;    // five chunks of a product
constexpr int64_t ROW_PIECE = 16384;    // values between linears that are worth a thread's while: about a microsecond
constexpr int64_t JOBS_A_LAYER = 16;

struct Layer {
    Group qkv, o, gate_up, down;
};

// The first entry that the query behind `length` entries sees.
int64_t oldest_seen(const QkLayer& layer, int64_t length) {
    return layer.window && length + 1 > layer.window ? length + 1 - layer.window : 0;
}

// The arguments of qk_decode, with a row for each sequence; or of qk_prompt, with a row for each token of one.
struct Asked {
    const QkDecoder& d;
    const QkCache* caches;
    const bool prompt;
    const int64_t rows, length, *tokens, *positions, *first;
    uint16_t* logits;  // null: of a prompt's last token not wanted
    const int isa, nthreads;
};

struct Step : Asked {
    const StepKernels* kernels = nullptr;
    Products products, last;  // last: of the rows whose logits are wanted, after the last layer's attention
    std::vector<Layer> layers;
    Group head;
    std::vector<float> x, normed;
    std::vector<uint16_t> half, q, k, v, gate, upper;
    float* partial = nullptr;  // of each key-value head and a span: [group][head_dim], then two of [group] (AttendArgs)

    explicit Step(const Asked& asked)
        : Asked(asked), products(asked.rows, asked.isa), last(asked.prompt ? 1 : asked.rows, asked.isa) {}

    // ---- before the threads ---------------------------------------------------------------------------------------

    int prepare() {
        kernels = step_for(isa);
        if (!kernels) return QK_BAD_ISA;
        layers.resize((size_t)d.n_layers);
        std::vector<Group*> groups;
        for (int64_t i = 0; i < d.n_layers; ++i) {
            const QkLayer& from = d.layers[i];
            Layer& to = layers[(size_t)i];
            Products& behind = i + 1 < d.n_layers ? products : last;
            int bad = QK_OK;
            for (const QkLinear* l : {&from.q, &from.k, &from.v}) bad = bad ? bad : to.qkv.add(*l, products);
            for (const QkLinear* l : {&from.gate, &from.up}) bad = bad ? bad : to.gate_up.add(*l, behind);
            bad = bad ? bad : to.o.add(from.o, behind);
            bad = bad ? bad : to.down.add(from.down, behind);
            if (bad) return bad;
            groups.insert(groups.end(), {&to.qkv, &to.o, &to.gate_up, &to.down});
        }
        if (const int bad = head.add(d.head, last)) return bad;
        groups.push_back(&head);

        int64_t laid_out = 0;  // one group is under way at a time
        for (const Group* g : groups) laid_out = std::max<int64_t>(laid_out, g->bytes);
        static thread_local Scratch inputs, attention;
        char* base = inputs.get((size_t)laid_out);
        const int64_t spread = prompt ? 0 : rows * spans(0) * d.heads * (d.head_dim + 2);
        partial = (float*)attention.get((size_t)spread * sizeof(float));
        if ((laid_out && !base) || (spread && !partial)) return QK_NO_MEMORY;
        for (Group* g : groups) g->place(base);

        x.resize((size_t)(rows * d.hidden));
        normed.resize(x.size());
        half.resize(x.size());
        q.resize((size_t)(rows * d.heads * d.head_dim));
        k.resize((size_t)(rows * d.kv_heads * d.head_dim));
        v.resize(k.size());
        gate.resize((size_t)(rows * d.intermediate));
        upper.resize(gate.size());
        return QK_OK;
    }

    // Of the entries that a query sees from `oldest` on.
    int64_t spans(int64_t oldest) const { return ceil_div(length + 1 - oldest, SPAN); }

    // ---- what each thread runs ------------------------------------------------------------------------------------

    // Lays the input of a group out, of which make(b) computes row b. Returns whether it is uneven.
    template <class Make>
    bool lay_out(Member& member, const Group& g, const uint16_t* in, const Make& make) const {
        const int64_t piece = rows_of(g.linears[0].of->cols);
        member.each(g.rows, piece, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b) {
                make(b);
                if (b == 0) g.clear();
                if (g.uneven(in, b)) member.raise();
            }
            if (g.rows == 1) g.lay_out(in, 0, 1, member.raised());
        });
        const bool careful = member.raised();
        if (g.rows > 1) member.each(g.rows, piece, [&](int64_t begin, int64_t end) { g.lay_out(in, begin, end, careful); });
        return careful;
    }
    static int64_t rows_of(int64_t values) { return ceil_div(ROW_PIECE, values); }

    void multiply(const Linear& l, const uint16_t* in, uint16_t* out, int64_t n, int64_t begin, int64_t end,
                  bool careful) const {
        if (l.usual) return l.multiply(out, n, begin, end, careful);
        kernels->dense(l.of->dense, in, l.of->bias, out, n, begin * WIDE, std::min<int64_t>(end * WIDE, l.of->rows), l.of->rows,
                       l.of->cols);
    }

    // The group's linears of the input that was laid out last, one after the other.
    void multiply(Member& member, const Group& g, const uint16_t* in, std::initializer_list<uint16_t*> outs,
                  bool careful) const {
        int64_t items = 0;
        for (int i = 0; i < g.count; ++i) items += g.linears[i].items(careful);
        member.each(items, g.linears[0].piece(), [&](int64_t begin, int64_t end) {
            int64_t at = 0;
            for (int i = 0; i < g.count; ++i) {
                const Linear& l = g.linears[i];
                const int64_t from = std::max<int64_t>(begin - at, 0), to = std::min<int64_t>(end - at, l.items(careful));
                if (from < to) multiply(l, in, outs.begin()[i], g.rows, from, to, careful);
                at += l.items(careful);
            }
        });
    }

    // x += y of row b, y normed first where the architecture does; then half = norm(x).
    void enter(int64_t b, const uint16_t* post_norm, const uint16_t* norm) {
        float *row = x.data() + b * d.hidden, *t = normed.data() + b * d.hidden;
        uint16_t* y = half.data() + b * d.hidden;
        if (post_norm) {
            kernels->widen(y, t, d.hidden, 1.0f);
            kernels->norm(t, post_norm, d.norm_offset, t, d.hidden, d.epsilon);
            for (int64_t i = 0; i < d.hidden; ++i) row[i] += t[i];
        } else {
            kernels->add(row, y, d.hidden);
        }
        kernels->norm(row, norm, d.norm_offset, t, d.hidden, d.epsilon);
        kernels->narrow(t, y, d.hidden);
    }

    void embed(int64_t b, const uint16_t* norm) {
        float *row = x.data() + b * d.hidden, *t = normed.data() + b * d.hidden;
        uint16_t* y = half.data() + b * d.hidden;
        kernels->widen(d.embedding + tokens[b] * d.hidden, row, d.hidden, d.embedding_scale);
        if (d.embedding_scale != 1.0f) {  // in bfloat16, as the model would
            kernels->narrow(row, y, d.hidden);
            kernels->widen(y, row, d.hidden, 1.0f);
        }
        kernels->norm(row, norm, d.norm_offset, t, d.hidden, d.epsilon);
        kernels->narrow(t, y, d.hidden);
    }

    // One head of queries or keys, normed and rotated. May be in place.
    void turn(const uint16_t* from, uint16_t* to, const uint16_t* norm, const QkLayer& layer, int64_t position) const {
        float one[MOST_DIM];
        const int64_t half_dim = d.head_dim / 2;
        kernels->widen(from, one, d.head_dim, 1.0f);
        if (norm) kernels->norm(one, norm, d.norm_offset, one, d.head_dim, d.epsilon);
        kernels->rotate(one, layer.cosine + position * half_dim, layer.sine + position * half_dim, half_dim);
        kernels->narrow(one, to, d.head_dim);
    }

    // q becomes what the heads attend to, of each sequence's token.
    void attention(Member& member, const QkLayer& layer, const QkCache& cache) {
        const int64_t dim = d.head_dim, group = d.heads / d.kv_heads, oldest = oldest_seen(layer, length);
        const int64_t pieces = spans(oldest), stride = group * (dim + 2);
        member.each(rows * d.kv_heads, rows_of((group + 2) * dim), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t b = item / d.kv_heads, slot = item * cache.capacity + length - cache.start;
                keep(layer, cache, item, slot, positions[b]);
            }
        });
        // A piece is worth a thread when it reads some 32 KiB of keys and values.
        const int64_t bytes = 4 * dim * std::min<int64_t>(length + 1 - oldest, SPAN);
        member.each(rows * d.kv_heads * pieces, std::max<int64_t>(1, 32768 / bytes), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item) {
                const int64_t which = item / pieces, b = which / d.kv_heads, at = oldest + item % pieces * SPAN;
                const int64_t from = std::max<int64_t>(at, first[b]), to = std::min<int64_t>(at + SPAN, length + 1);
                const int64_t slot = which * cache.capacity + from - cache.start;
                float* out = partial + item * stride;
                if (from < to)
                    kernels->attend({q.data() + which * group * dim, cache.keys + slot * dim, cache.values + slot * dim, group,
                                     dim, to - from, d.attention_scale, out, out + group * dim, out + group * (dim + 1)});
                else
                    for (int64_t g = 0; g < group; ++g) out[group * dim + g] = -INFINITY;
            }
        });
        member.each(rows * d.kv_heads, rows_of(pieces * group * dim), [&](int64_t begin, int64_t end) {
            for (int64_t item = begin; item < end; ++item)
                for (int64_t g = 0; g < group; ++g)
                    join(partial + item * pieces * stride, g, group, pieces, q.data() + (item * group + g) * dim);
        });
    }

    // Key, value and queries of one key-value head of one row.
    void keep(const QkLayer& layer, const QkCache& cache, int64_t item, int64_t slot, int64_t position) {
        const int64_t dim = d.head_dim, group = d.heads / d.kv_heads;
        turn(k.data() + item * dim, cache.keys + slot * dim, layer.k_norm, layer, position);
        std::memcpy(cache.values + slot * dim, v.data() + item * dim, (size_t)dim * 2);
        uint16_t* queries = q.data() + item * group * dim;
        for (int64_t g = 0; g < group; ++g) turn(queries + g * dim, queries + g * dim, layer.q_norm, layer, position);
    }

    // The same of a prompt's tokens, from row `begin` on.
    void prompt_attention(Member& member, const QkLayer& layer, const QkCache& cache, int64_t begin) {
        const int64_t dim = d.head_dim, group = d.heads / d.kv_heads;
        member.each(rows * d.kv_heads, rows_of((group + 2) * dim), [&](int64_t from, int64_t to) {
            for (int64_t item = from; item < to; ++item) {
                const int64_t row = item / d.kv_heads, head = item % d.kv_heads;
                keep(layer, cache, item, head * cache.capacity + length + row - cache.start, positions[row]);
            }
        });
        const int64_t pieces = ceil_div((rows - begin) * group, PROMPT_QUERIES);
        member.each(d.kv_heads * pieces, 1, [&](int64_t from, int64_t to) {
            for (int64_t item = from; item < to; ++item) {
                const int64_t head = item / pieces, at = begin * group + item % pieces * PROMPT_QUERIES;
                const int64_t oldest = std::max<int64_t>(first[0], oldest_seen(layer, length + at / group));
                const int64_t slot = head * cache.capacity + oldest - cache.start;
                kernels->attend_prompt({q.data() + head * group * dim, d.heads * dim, group, dim, at,
                                        std::min<int64_t>(at + PROMPT_QUERIES, rows * group), length,
                                        cache.keys + slot * dim, cache.values + slot * dim, oldest, layer.window,
                                        d.attention_scale});
            }
        });
    }

    // The spans of one query, from `spans` on, as one softmax.
    void join(const float* of, int64_t g, int64_t group, int64_t count, uint16_t* to) const {
        const int64_t dim = d.head_dim, stride = group * (dim + 2);
        float high = -INFINITY, all = 0.0f, sum[MOST_DIM] = {};
        for (int64_t s = 0; s < count; ++s) {
            const float m = of[s * stride + group * dim + g];
            high = m > high || m != m ? m : high;
        }
        for (int64_t s = 0; s < count; ++s) {
            const float* span = of + s * stride;
            if (span[group * dim + g] == -INFINITY) continue;  // nothing that this sequence sees
            const float weight = std::exp(span[group * dim + g] - high);
            all += weight * span[group * (dim + 1) + g];
            for (int64_t i = 0; i < dim; ++i) sum[i] += weight * span[g * dim + i];
        }
        for (int64_t i = 0; i < dim; ++i) sum[i] /= all;
        kernels->narrow(sum, to, dim);
    }

    // gate = act(gate) * up, as soon as a block of both is there.
    void gated(Member& member, const Group& g, bool careful) {
        const int64_t items = g.linears[0].items(careful);
        member.each(items, g.linears[0].piece(), [&](int64_t begin, int64_t end) {
            multiply(g.linears[0], half.data(), gate.data(), g.rows, begin, end, careful);
            multiply(g.linears[1], half.data(), upper.data(), g.rows, begin, end, careful);
            const int64_t n = std::min<int64_t>(end * WIDE, d.intermediate) - begin * WIDE;
            for (int64_t b = 0; b < g.rows; ++b) {
                const int64_t at = b * d.intermediate + begin * WIDE;
                kernels->gated(gate.data() + at, upper.data() + at, gate.data() + at, n, d.activation);
            }
        });
    }

    // Of the last layer's attention on the last row alone counts.
    void bring_last_row() {
        std::memmove(x.data(), x.data() + (rows - 1) * d.hidden, (size_t)d.hidden * sizeof(float));
        const int64_t width = d.heads * d.head_dim;
        std::memmove(q.data(), q.data() + (rows - 1) * width, (size_t)width * 2);
    }

    void run(Member& member) {
        const auto as_it_is = [](int64_t) {};
        for (int64_t i = 0; i < d.n_layers; ++i) {
            const QkLayer& layer = d.layers[i];
            const Layer& own = layers[(size_t)i];
            bool careful = lay_out(member, own.qkv, half.data(), [&](int64_t b) {
                if (i == 0) embed(b, layer.attention_norm);
                else enter(b, d.layers[i - 1].mlp_post_norm, layer.attention_norm);
            });
            multiply(member, own.qkv, half.data(), {q.data(), k.data(), v.data()}, careful);
            const bool behind = i + 1 == d.n_layers;
            if (prompt) prompt_attention(member, layer, caches[i], behind ? rows - 1 : 0);
            else attention(member, layer, caches[i]);
            if (prompt && behind) {
                if (!logits) return;
                member.each(1, 1, [&](int64_t, int64_t) { bring_last_row(); });
            }
            careful = lay_out(member, own.o, q.data(), as_it_is);
            multiply(member, own.o, q.data(), {half.data()}, careful);
            careful = lay_out(member, own.gate_up, half.data(),
                              [&](int64_t b) { enter(b, layer.attention_post_norm, layer.mlp_norm); });
            if (prompt) {
                multiply(member, own.gate_up, half.data(), {gate.data(), upper.data()}, careful);
                careful = lay_out(member, own.down, gate.data(), [&](int64_t b) {
                    uint16_t* row = gate.data() + b * d.intermediate;
                    kernels->gated(row, upper.data() + b * d.intermediate, row, d.intermediate, d.activation);
                });
            } else {
                gated(member, own.gate_up, careful);
                careful = lay_out(member, own.down, gate.data(), as_it_is);
            }
            multiply(member, own.down, gate.data(), {half.data()}, careful);
        }
        const bool careful = lay_out(member, head, half.data(), [&](int64_t b) {
            enter(b, d.layers[d.n_layers - 1].mlp_post_norm, d.final_norm);
        });
        multiply(member, head, half.data(), {logits}, careful);
    }
};

bool whole(const QkLinear& l, int64_t rows, int64_t cols) {
    if (!l.dense && l.int8 && l.quantized.table) return false;
    return l.rows == rows && l.cols == cols && (l.dense || (l.quantized.rows == rows && l.quantized.cols == cols));
}

int check(const QkDecoder& d) {
    if (d.n_layers < 1 || d.hidden < 1 || d.heads < 1 || d.kv_heads < 1 || d.heads % d.kv_heads || d.head_dim < 2 ||
        d.head_dim % 2 || d.head_dim > MOST_DIM || d.intermediate < 1 || d.vocabulary < 1)
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

// For `more` entries behind the first `length`.
int check(const QkCache& c, const QkLayer& layer, int64_t length, int64_t more) {
    if (!c.keys || !c.values) return QK_NULL;
    return c.start < 0 || c.start > oldest_seen(layer, length) || length + more - c.start > c.capacity ? QK_BAD_SHAPE : QK_OK;
}

int run(const Asked& a) {
    if (!a.caches || !a.tokens || !a.positions || !a.first || (!a.logits && !a.prompt)) return QK_NULL;
    if (const int bad = check(a.d)) return bad;
    if (a.rows < 1 || a.rows > (a.prompt ? MOST_PROMPT : MOST_BATCH) || a.length < 0) return QK_BAD_SHAPE;
    if (a.prompt && (a.d.head_dim > PROMPT_DIM || a.d.head_dim % 8)) return QK_BAD_SHAPE;
    for (int64_t l = 0; l < a.d.n_layers; ++l)
        if (const int bad = check(a.caches[l], a.d.layers[l], a.length, a.prompt ? a.rows : 1)) return bad;
    for (int64_t b = 0; b < a.rows; ++b) {
        const int64_t seen = a.first[a.prompt ? 0 : b];
        if (a.tokens[b] < 0 || a.tokens[b] >= a.d.vocabulary || a.positions[b] < 0 || seen < 0 || seen > a.length)
            return QK_BAD_SHAPE;
    }
    try {
        Step step(a);
        if (const int bad = step.prepare()) return bad;
        Team team(JOBS_A_LAYER * (a.d.n_layers + 1), a.nthreads);
        auto program = [&](Member& member) { step.run(member); };
        team.run(program);
        return QK_OK;
    } catch (const std::bad_alloc&) {
        return QK_NO_MEMORY;
    }
}

}  // namespace

int qk_dense(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m, int64_t rows,
             int64_t cols, int nthreads) {
    if (m < 0 || rows < 1 || cols < 1) return QK_BAD_SHAPE;
    if (!w || !x || !out) return QK_NULL;
    const StepKernels* kernels = nullptr;
    for (int isa = 0; isa < QK_ISA_COUNT; ++isa)
        if (const StepKernels* found = step_for(isa)) kernels = found;
    auto body = [&](int64_t begin, int64_t end) { kernels->dense(w, x, bias, out, m, begin, end, rows, cols); };
    const int64_t rows_a_piece = 131072 / cols;
    parallel_for(rows, rows_a_piece > 1 ? rows_a_piece : 1, nthreads, body);
    return QK_OK;
}

int qk_decode(const QkDecoder* decoder, const QkCache* caches, int64_t batch, int64_t length, const int64_t* tokens,
              const int64_t* positions, const int64_t* first, uint16_t* logits, int isa, int nthreads) {
    return decoder ? run({*decoder, caches, false, batch, length, tokens, positions, first, logits, isa, nthreads}) : QK_NULL;
}

int qk_prompt(const QkDecoder* decoder, const QkCache* caches, int64_t n, int64_t length, const int64_t* tokens,
              const int64_t* positions, int64_t first, uint16_t* logits, int isa, int nthreads) {
    return decoder ? run({*decoder, caches, true, n, length, tokens, positions, &first, logits, isa, nthreads}) : QK_NULL;
}
