// The kernels of gemm_4bit_small_m_sm90.cuh for one round of K.
#include "gemm/small_m_sm90/gemm_4bit_small_m_sm90.cuh"

SMALL_M_SM90(gemm_4bit_small_m_sm90_bf16_8, Bf16, false, 1, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_bf16_16, Bf16, false, 2, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_bf16_8_nested, Bf16, true, 1, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_bf16_16_nested, Bf16, true, 2, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_f16_8, F16, false, 1, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_f16_16, F16, false, 2, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_f16_8_nested, F16, true, 1, false)
SMALL_M_SM90(gemm_4bit_small_m_sm90_f16_16_nested, F16, true, 2, false)
