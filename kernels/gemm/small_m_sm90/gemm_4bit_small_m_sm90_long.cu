// The kernels of gemm_4bit_small_m_sm90.cuh for several rounds of K. Those for 32 columns are for one round too.
#include "gemm/small_m_sm90/gemm_4bit_small_m_sm90.cuh"

SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_8, Bf16, false, 1, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_16, Bf16, false, 2, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_8_nested, Bf16, true, 1, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_16_nested, Bf16, true, 2, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_8, F16, false, 1, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_16, F16, false, 2, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_8_nested, F16, true, 1, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_16_nested, F16, true, 2, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_32, Bf16, false, 4, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_bf16_32_nested, Bf16, true, 4, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_32, F16, false, 4, true)
SMALL_M_SM90(gemm_4bit_small_m_sm90_long_f16_32_nested, F16, true, 4, true)
