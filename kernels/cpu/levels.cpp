// Which instruction sets this build and this machine share.
#include "levels.h"

#include "qkit_cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

using namespace qkit;

namespace {

#if defined(__x86_64__)

bool avx2() {
    unsigned a, b, c, d;
    // F16C has no name in older compilers' __builtin_cpu_supports: leaf 1, ECX bit 29.
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool avx512() {
    return avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }

// Leaf 7, subleaf 1, EAX. The system saves the registers: AVX2 and AVX-512 were there.
bool leaf7_1(int bit) {
    unsigned a = 0, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << bit));
}

bool avx512bf16() { return avx512vnni() && leaf7_1(5); }

#if defined(QKIT_EMULATE)
bool avxvnni() { return avx2(); }
bool amx() { return avx512bf16(); }
#else
bool avxvnni() { return avx2() && leaf7_1(4); }

// The processor has tiles and their byte products, the system saves their state, and lets this process use them.
bool amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;  // leaf 7, EDX
    constexpr unsigned STATE = 3u << 17;                  // XCR0: tile configuration and data
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d;
    if (!avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (~d & (TILE | INT8))) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return !(~low & STATE) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif  // QKIT_EMULATE

#elif defined(__aarch64__)

#if defined(__linux__)
bool dotprod() { return getauxval(AT_HWCAP) & (1ul << 20); }
bool i8mm() { return dotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)); }
#elif defined(__APPLE__)
bool feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool dotprod() { return feature("hw.optional.arm.FEAT_DotProd"); }
bool i8mm() { return dotprod() && feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool dotprod() { return false; }
bool i8mm() { return false; }
#endif

#endif

bool always() { return true; }

struct Level {
    bool here = false;
    const RowKernels* rows = nullptr;
    PickFn tile = nullptr;
    const StepKernels* step = nullptr;
    Level() = default;
    Level(bool (*present)(), const RowKernels* (*kernels)(), PickFn pick, const StepKernels* (*between)())
        : here(present()), tile(pick) {
        if (!here) return;
        rows = kernels();  // its file may use the instructions anywhere
        step = between();
    }
};

struct Levels {
    Level of[QK_ISA_COUNT];
    Levels() {
        of[QK_SCALAR] = {always, scalar_kernels, scalar_tile, scalar_step};
#ifdef QKIT_HAS_AVX2
        of[QK_AVX2] = {avx2, avx2_kernels, avx2_tile, avx2_step};
        of[QK_AVX512] = {avx512, avx512_kernels, avx512_tile, avx512_step};
        of[QK_AVX512VNNI] = {avx512vnni, avx512_kernels, avx512vnni_tile, avx512_step};
#endif
#ifdef QKIT_HAS_AVXVNNI
        of[QK_AVXVNNI] = {avxvnni, avx2_kernels, avxvnni_tile, avx2_step};
#endif
#ifdef QKIT_HAS_AVX512BF16
        of[QK_AVX512BF16] = {avx512bf16, avx512_kernels, avx512bf16_tile, avx512bf16_step};
#endif
#ifdef QKIT_HAS_AMX
        of[QK_AMX] = {amx, avx512_kernels, amx_tile, avx512bf16_step};
#endif
#ifdef QKIT_HAS_DOTPROD
        of[QK_DOTPROD] = {dotprod, scalar_kernels, dotprod_tile, scalar_step};
#endif
#ifdef QKIT_HAS_I8MM
        of[QK_I8MM] = {i8mm, scalar_kernels, i8mm_tile, scalar_step};
#endif
    }
};

const Level* level(int isa) {
    static const Levels levels;
    return isa >= 0 && isa < QK_ISA_COUNT && levels.of[isa].here ? &levels.of[isa] : nullptr;
}

}  // namespace

const RowKernels* qkit::kernels_for(int isa) {
    const Level* l = level(isa);
    return l ? l->rows : nullptr;
}

PickFn qkit::matmul_for(int isa) {
    const Level* l = level(isa);
    return l ? l->tile : nullptr;
}

const StepKernels* qkit::step_for(int isa) {
    const Level* l = level(isa);
    return l ? l->step : nullptr;
}

int qk_has_isa(int isa) { return level(isa) != nullptr; }
