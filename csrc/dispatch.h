// Chooses, once per process, the widest instruction set that both this build and this CPU have.
#pragma once

namespace gsscale {

enum class Isa { baseline, avx2, avx512 };

// The environment variable GSSCALE_ISA (baseline, avx2, avx512) lowers the choice, for tests.
Isa active_isa();
const char *isa_name(Isa isa);

// Calls `isa::function` of the active instruction set; every argument list is the same.
#if defined(__x86_64__) || defined(_M_X64)
#define GSSCALE_DISPATCH(function, ...)                                                            \
    (gsscale::active_isa() == gsscale::Isa::avx512 ? gsscale::avx512::function(__VA_ARGS__)        \
     : gsscale::active_isa() == gsscale::Isa::avx2 ? gsscale::avx2::function(__VA_ARGS__)          \
                                                   : gsscale::baseline::function(__VA_ARGS__))
#define GSSCALE_FOR_EACH_ISA(declaration)                                                          \
    namespace baseline { declaration }                                                             \
    namespace avx2 { declaration }                                                                 \
    namespace avx512 { declaration }
#else
#define GSSCALE_DISPATCH(function, ...) (gsscale::baseline::function(__VA_ARGS__))
#define GSSCALE_FOR_EACH_ISA(declaration)                                                          \
    namespace baseline { declaration }
#endif

}  // namespace gsscale
