// The kernels of one_row.cuh.
#include "gemm/small_m_sm90/one_row.cuh"

ONE_ROW_SM90(gemm_4bit_small_m_sm90_one_bf16, Bf16, false)
ONE_ROW_SM90(gemm_4bit_small_m_sm90_one_bf16_nested, Bf16, true)
ONE_ROW_SM90(gemm_4bit_small_m_sm90_one_f16, F16, false)
ONE_ROW_SM90(gemm_4bit_small_m_sm90_one_f16_nested, F16, true)
