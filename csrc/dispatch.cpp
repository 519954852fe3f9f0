#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace gsscale {

static Isa detect() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_cpu_init();
    Isa best = Isa::baseline;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        best = Isa::avx512;
    if (const char *wanted = std::getenv("GSSCALE_ISA")) {
        Isa limit = std::strcmp(wanted, "baseline") == 0 ? Isa::baseline
                    : std::strcmp(wanted, "avx2") == 0   ? Isa::avx2
                                                         : Isa::avx512;
        if (limit < best) best = limit;
    }
    return best;
#else
    return Isa::baseline;
#endif
}

Isa active_isa() {
    static const Isa isa = detect();
    return isa;
}

const char *isa_name(Isa isa) {
    return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

}  // namespace gsscale
