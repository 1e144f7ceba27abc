// The linears of a decoding step: how each is multiplied, and where its input is laid out.
#pragma once
#include <deque>

#include "product.h"
#include "qkit_decoder.h"
#include "sizes.h"

namespace qkit {

constexpr int64_t WEIGHT_PIECE = 16384;  // bytes of weights that are worth a thread's while: about a microsecond

// The products of so many rows: few shapes of weights recur in all layers.
class Products {
  public:
    Products(int64_t rows, int isa) : rows(rows), isa_(isa) {}

    const int64_t rows;

    // A QkStatus. careful: for uneven inputs.
    int find(const QkLinear& l, bool careful, const Product*& found) {
        const QkWeight& w = l.quantized;
        const int limbs = limbs_of(w, QK_BF16, l.int8, careful, rows, isa_);
        for (const Product& p : made_)
            if (p.bits == w.bits && p.cols == w.cols && p.groups == w.groups && p.limbs == limbs &&
                p.table == (w.table != nullptr)) {
                found = &p;
                return QK_OK;
            }
        made_.emplace_back();
        found = &made_.back();
        return made_.back().plan(w, rows, QK_BF16, limbs, isa_);
    }

  private:
    const int isa_;
    std::deque<Product> made_;  // which does not move them
};

struct Linear {
    const QkLinear* of = nullptr;
    const Product *usual = nullptr, *careful = nullptr;  // null: dense
    int64_t at = 0;       // where its input is laid out, in bytes from its group's
    bool shares = false;  // what an earlier linear of the group has laid out there
    char* base = nullptr;

    // Blocks of 32 outputs, each once for as many rows as a chunk of the product has.
    int64_t items(bool uneven) const {
        const Product* p = uneven ? careful : usual;
        return p ? p->items(of->quantized, p->tiles) : ceil_div(of->rows, WIDE);
    }
    int64_t piece() const { return ceil_div(WEIGHT_PIECE, WIDE * of->cols * (usual ? of->quantized.bits : 16) / 8); }  // in items

    // Items begin .. end of a quantized linear.
    void multiply(uint16_t* out, int64_t rows, int64_t begin, int64_t end, bool uneven) const {
        const Product& p = uneven ? *careful : *usual;
        p.multiply(of->quantized, base, p.tiles, rows, (const char*)of->bias, (char*)out, begin, end);
    }
};

// Linears of the same input, bfloat16 [rows][cols].
struct Group {
    Linear linears[3];
    int count = 0;
    int64_t rows = 0;
    int64_t bytes = 0;  // of its inputs, each laid out in its own way

    int add(const QkLinear& l, Products& products) {
        Linear& to = linears[count++];
        to.of = &l;
        rows = products.rows;
        if (l.dense) return QK_OK;
        if (const int bad = products.find(l, false, to.usual)) return bad;
        if (const int bad = products.find(l, true, to.careful)) return bad;
        for (int i = 0; i < count - 1 && !to.shares; ++i) {
            const Linear& other = linears[i];
            to.shares = other.usual == to.usual && !other.of->quantized.zero == !l.quantized.zero;
            if (to.shares) to.at = other.at;
        }
        if (to.shares) return QK_OK;
        to.at = bytes;
        const int64_t usual = to.usual->tiles * to.usual->tile_bytes();
        bytes += ceil_div(std::max<int64_t>(usual, to.careful->tiles * to.careful->tile_bytes()), 4096) * 4096;
        return QK_OK;
    }

    void place(char* base) {
        for (Linear& l : linears) l.base = base + l.at;
    }

    // Before rows are laid out.
    void clear() const {
        each([&](const Linear& l) {
            l.usual->clear(l.base, l.usual->tiles, rows);
            l.careful->clear(l.base, l.careful->tiles, rows);
        });
    }
    bool uneven(const uint16_t* in, int64_t row) const {
        bool found = false;
        each([&](const Linear& l) {
            found = found || l.usual->uneven((const char*)in, row);
        });
        return found;
    }
    void lay_out(const uint16_t* in, int64_t begin, int64_t end, bool uneven) const {
        each([&](const Linear& l) {
            (uneven ? l.careful : l.usual)->lay_out(l.of->quantized, l.base, (const char*)in, begin, end);
        });
    }

  private:
    // Those that have an input of their own laid out.
    template <class Body>
    void each(const Body& body) const {
        for (int i = 0; i < count; ++i)
            if (linears[i].usual && !linears[i].shares) body(linears[i]);
    }
};

}  // namespace qkit
