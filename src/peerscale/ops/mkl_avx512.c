/* MKL, which torch's matrix products call, uses AVX-512 where the processor has it, but on processors that are not
 * Intel's only if this function, which takes the place of its own, says that they are: two to three times as fast on
 * AMD's. Loaded before torch by `make ... AVX512=1`. After Daniël de Kok, "Intel MKL on AMD Zen", 2020. */
int mkl_serv_intel_cpu_true(void) { return 1; }
