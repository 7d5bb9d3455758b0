// The table of one instruction set: compiled once for each, with GSPN_ISA naming the namespace.
#include "simd.h"

namespace gspn::GSPN_ISA {

extern const LineScanKernel line_scan_forward, line_scan_backward, line_scan_merge_taps;
extern const PropagateKernel propagate_pack, propagate_forward, propagate_backward, propagate_merge_directions,
    propagate_merge_proxy, propagate_merge_weights;
void exp2_of_all(int32_t dtype, const void* in, void* out, int64_t count);

extern const Kernels kernels;
const Kernels kernels = {
    GSPN_ISA_NAME,           GSPN_VECTOR_BYTES, line_scan_forward,  line_scan_backward,         line_scan_merge_taps,
    propagate_pack,          propagate_forward, propagate_backward, propagate_merge_directions, propagate_merge_proxy,
    propagate_merge_weights, exp2_of_all,
};

}  // namespace gspn::GSPN_ISA
