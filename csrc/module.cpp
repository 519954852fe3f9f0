// The Python module gsscale_nerfstudio._C: arithmetic on raw buffers, no torch.
#include <omp.h>

#include "buffers.h"
#include "dispatch.h"

namespace gsscale {
void bind_rows(nb::module_ &m);
void bind_cull(nb::module_ &m);
void bind_order(nb::module_ &m);
void bind_sets(nb::module_ &m);
void bind_slots(nb::module_ &m);
}  // namespace gsscale

NB_MODULE(_C, m) {
    // The viewer's threads hold an engine until the interpreter is gone: nanobind would end every
    // such training with a report of leaks.
    gsscale::nb::set_leak_warnings(false);
    m.doc() = "Kernels of gsscale: rows (settle, step, gather), culling, row order and sets, slots.";
    m.def("isa", [] { return gsscale::isa_name(gsscale::active_isa()); },
          "Instruction set in use: baseline, avx2 or avx512.");
    m.def("set_threads", [](int n) { omp_set_num_threads(n < 1 ? 1 : n); }, gsscale::nb::arg("n"),
          "Let kernels that the calling thread runs use at most n threads.");
    gsscale::bind_rows(m);
    gsscale::bind_cull(m);
    gsscale::bind_order(m);
    gsscale::bind_sets(m);
    gsscale::bind_slots(m);
}
