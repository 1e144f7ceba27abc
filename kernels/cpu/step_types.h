// What lies between the linears of a decoding step (decoder.cpp), and its 16-bit linears: what an ISA file provides.
#pragma once
#include <cstdint>

namespace qkit {

// Entries of keys and values that are attended to at a time. Fixed, so that results do not depend on the threads.
constexpr int64_t SPAN = 256;
constexpr int64_t MOST_DIM = 1024;  // of a head

// Queries that share a key-value head, over n <= SPAN entries.
struct AttendArgs {
    const uint16_t* q;  // [group][dim]
    const uint16_t *keys, *values;  // [n][dim]
    int64_t group, dim, n;
    float scale;
    float *out, *most, *total;  // [group][dim]: sum of e**(score - most) * value; [group]: the largest score; sum of e**...
};

constexpr int64_t PROMPT_QUERIES = 96;  // at most, of PromptArgs
constexpr int64_t PROMPT_DIM = 256;     // of a head, at most; a multiple of eight

// Queries begin .. end of one key-value head of a prompt, counted row by row, the heads that share it within a row. They
// become what the head gives.
struct PromptArgs {
    uint16_t* q;  // of the head's first query, row by row
    int64_t row;  // values from one row to the next
    int64_t group, dim, begin, end;
    int64_t entry;  // of row 0; a query sees entries up to its row's
    const uint16_t *keys, *values;  // [entries][dim], of entry `from` on, before which no query here sees anything
    int64_t from, window;  // window: entries that a query sees, or 0 for all
    float scale;
};

// bfloat16 but where it says float. Nothing here is promised bit for bit across ISAs.
struct StepKernels {
    void (*widen)(const uint16_t* x, float* to, int64_t n, float scale);  // x * scale
    void (*narrow)(const float* x, uint16_t* to, int64_t n);
    void (*add)(float* x, const uint16_t* y, int64_t n);  // x += y
    // to = x / rms(x) * (weight + offset); may be in place
    void (*norm)(const float* x, const uint16_t* weight, float offset, float* to, int64_t n, float epsilon);
    void (*rotate)(float* x, const float* cosine, const float* sine, int64_t half);  // in place, the halves of x
    void (*gated)(const uint16_t* gate, const uint16_t* up, uint16_t* to, int64_t n, int activation);  // act(gate) * up
    void (*attend)(const AttendArgs&);
    void (*attend_prompt)(const PromptArgs&);
    // out[m][begin .. end) of [m][rows] = x [m][cols] @ w[begin .. end).T + bias
    void (*dense)(const uint16_t* w, const uint16_t* x, const uint16_t* bias, uint16_t* out, int64_t m, int64_t begin,
                  int64_t end, int64_t rows, int64_t cols);
};

// Null where this build or this machine lacks the ISA.
const StepKernels* step_for(int isa);

}  // namespace qkit
