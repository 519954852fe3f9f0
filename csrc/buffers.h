// Checked access to numpy/torch buffers that come in from Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace gsscale {

namespace nb = nanobind;

// C-contiguous CPU arrays. Bind them with .noconvert(): nanobind then rejects other dtypes, shapes
// and strides with a TypeError, instead of handing us a converted copy whose changes are lost.
using Floats1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

}  // namespace gsscale
