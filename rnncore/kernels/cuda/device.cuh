// All that is PTX or an intrinsic.  Tests compile the kernels for the CPU with a header of theirs in place of this one.
#pragma once
#ifdef RNN_EMULATED
#include RNN_EMULATED
#else

#define RNN_DEVICE __device__ __forceinline__
#define RNN_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define RNN_CONSTANT constexpr __device__
#define RNN_UNROLL _Pragma("unroll")

namespace rnn {

using u16 = unsigned short;
using u32 = unsigned;
struct __align__(16) Words {
  u32 v[4];
};

struct bf16 {
  u16 bits;
};
struct f16 {
  u16 bits;
};

RNN_DEVICE int thread_number() { return threadIdx.x; }
RNN_DEVICE int block_number() { return blockIdx.x; }
RNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
RNN_DEVICE void sync_block() { __syncthreads(); }
RNN_DEVICE u32 from_lane_above(u32 value, int lanes) { return __shfl_down_sync(~0u, value, lanes); }
RNN_DEVICE float from_lane(float value, int lane) { return __shfl_sync(~0u, value, lane); }
RNN_DEVICE u32 from_lane(u32 value, int lane) { return __shfl_sync(~0u, value, lane); }
RNN_DEVICE bool any_in_warp(bool value) { return __any_sync(~0u, value); }
RNN_DEVICE void give_up() { __trap(); }

RNN_DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
RNN_DEVICE float float_of(u32 x) { return __uint_as_float(x); }

RNN_DEVICE float wide(float x) { return x; }
RNN_DEVICE float wide(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
RNN_DEVICE float wide(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Rounded to the nearest; of a NaN its one canonical form, so that no number has all bits set.
RNN_DEVICE void narrow(float x, float& to) { to = x == x ? x : __uint_as_float(0x7fffffff); }
RNN_DEVICE void narrow(float x, bf16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
RNN_DEVICE void narrow(float x, f16& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

// What nobody writes while the kernel runs.
RNN_DEVICE float load(const float* p) { return __ldg(p); }
RNN_DEVICE bf16 load(const bf16* p) { return {__ldg(&p->bits)}; }
RNN_DEVICE f16 load(const f16* p) { return {__ldg(&p->bits)}; }
RNN_DEVICE Words load(const Words* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Brings a line into the L2 cache.
RNN_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// What other blocks write, and for them.
RNN_DEVICE Words load_shared_between_blocks(const void* p) {
  Words w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3]) : "l"(p) : "memory");
  return w;
}
RNN_DEVICE void store_shared_between_blocks(void* p, u32 value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// What the blocks of a cluster write into each other's shared memory, and how they hear that all of it is there.
struct Signal {
  unsigned long long word;
};
#if __CUDA_ARCH__ >= 900
RNN_DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
RNN_DEVICE u32 in_block(u32 address, int block) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
RNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
RNN_DEVICE void start(Signal* signal) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(signal))
               : "memory");
}
RNN_DEVICE void expect(Signal* signal, int bytes) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
                   shared_address(signal)), "r"(bytes) : "memory");
}
RNN_DEVICE void wait(const Signal* signal, int phase) {
  u32 done = 0;
  for (int tries = 0; !done; tries++) {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(signal)), "r"(phase) : "memory");
    if (tries == 1 << 24) give_up();
  }
}
// To the same place in the shared memory of a block of the cluster, whose signal hears of 16 bytes.
RNN_DEVICE void send(const Words& w, const void* to, const Signal* signal, int block) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   in_block(shared_address(to), block)), "r"(w.v[0]), "r"(w.v[1]), "r"(w.v[2]), "r"(w.v[3]),
               "r"(in_block(shared_address(signal), block)) : "memory");
}
#else  // no clusters: nothing calls these
RNN_DEVICE void sync_cluster() { give_up(); }
RNN_DEVICE void start(Signal*) { give_up(); }
RNN_DEVICE void expect(Signal*, int) { give_up(); }
RNN_DEVICE void wait(const Signal*, int) { give_up(); }
RNN_DEVICE void send(const Words&, const void*, const Signal*, int) { give_up(); }
#endif

RNN_DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RNN_DEVICE float fast_exp(float x) { return __expf(x); }
RNN_DEVICE float fast_divide(float x, float y) { return __fdividef(x, y); }

// d += a b: a 16 rows by 16 (8 of float32) columns, b these by 8, as PTX's mma lays them over a warp's lanes.
RNN_DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
RNN_DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
RNN_DEVICE void multiply_tf32(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
RNN_DEVICE u32 to_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

}  // namespace rnn
#endif
