// A libcudnn for tests: what rnncore calls of it, checked as the library checks and computed on the CPU in double.
//
// Every call with what matters of its arguments is written down, see stand_in_calls.  It refuses what the library does
// not promise, and leaves NaN where the library leaves what it likes.  Weights lie as the library has them: matrices of
// every layer and direction, inputs before h, a row for each unit of each gate; then all biases in the same order.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace {

enum Status { kSuccess = 0, kBadParam = 2000, kNotSupported = 3000 };
enum { kRelu, kTanh, kLstm, kGru };
enum { kFloat = 0, kHalf = 2, kBfloat16 = 9 };
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kStamp = 8;  // bytes at the head of the reserve: who wrote it last

std::string calls;

template <class... Values>
void record(const char* format, Values... values) {
  char line[400];
  std::snprintf(line, sizeof line, format, values...);
  calls += line;
  calls += '\n';
}

struct Rnn {
  int algorithm, mode, bias, direction, input, data, arithmetic, math;
  int64_t inputs, hidden, projected, layers;
  uint32_t flags;

  int64_t gates() const { return mode == kLstm ? 4 : mode == kGru ? 3 : 1; }
  int64_t directions() const { return direction + 1; }
  int64_t features(int64_t layer) const { return layer ? directions() * hidden : inputs; }
  int64_t matrix(int64_t layer, bool recurrent) const {  // where it begins, in numbers
    int64_t at = 0;
    for (int64_t n = 0; n < layer; n++) at += gates() * hidden * (features(n / directions()) + hidden);
    return at + (recurrent ? gates() * hidden * features(layer / directions()) : 0);
  }
  int64_t bias_at(int64_t layer, bool recurrent) const {
    return matrix(layers * directions(), false) + (2 * layer + recurrent) * gates() * hidden;
  }
  int64_t weights() const { return bias_at(layers * directions(), false); }
};

struct Data {
  int data, layout;
  int64_t steps, batch, size;
  std::vector<int> lengths;
  bool full() const {
    for (int n : lengths)
      if (n != steps) return false;
    return true;
  }
};

struct Tensor {
  int data = -1, rank = 0, dims[5], strides[5];
};

int64_t bytes_of(int data) { return data == kFloat ? 4 : 2; }

// An array of the caller's, in its own format.
struct View {
  void* at;
  int data;
  double operator[](int64_t n) const {
    if (data == kFloat) return static_cast<float*>(at)[n];
    const uint32_t bits = static_cast<uint16_t*>(at)[n];
    if (data == kBfloat16) {
      const uint32_t wide = bits << 16;
      float value;
      std::memcpy(&value, &wide, 4);
      return value;
    }
    const int exponent = bits >> 10 & 31;
    const double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? kNaN : sign * HUGE_VAL;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
  }
  void set(int64_t n, double value) const {
    if (data == kFloat) {
      static_cast<float*>(at)[n] = float(value);
      return;
    }
    uint16_t bits;
    if (data == kBfloat16) {
      const float narrow = float(value);
      uint32_t wide;
      std::memcpy(&wide, &narrow, 4);
      bits = std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
    } else if (std::isnan(value)) {
      bits = 0x7e00;
    } else {
      const double size = std::fabs(value);
      int exponent = size ? std::ilogb(size) : -15;
      if (exponent < -14) exponent = -15;
      const double digits = std::nearbyint(std::ldexp(size, exponent == -15 ? 24 : 10 - exponent));
      const int64_t whole = exponent == -15 ? int64_t(digits) : (int64_t(exponent + 14) << 10) + int64_t(digits);
      bits = (std::signbit(value) ? 0x8000 : 0) | (whole > 0x7c00 ? 0x7c00 : whole);
    }
    static_cast<uint16_t*>(at)[n] = bits;
  }
};

// The reserve: of every layer and direction, step and sequence what the update kept and its derivatives, and of every
// layer the outputs.
struct Reserve {
  const Rnn& rnn;
  int64_t steps, batch;
  double* at;
  Reserve(const Rnn& r, const Data& x, void* reserve)
      : rnn(r), steps(x.steps), batch(x.batch), at(reinterpret_cast<double*>(static_cast<char*>(reserve) + kStamp)) {}
  int64_t line() const { return steps * batch * rnn.hidden; }
  int64_t numbers() const { return rnn.layers * rnn.directions() * (3 * rnn.gates() + 2) * line(); }
  double& part(int64_t layer, int64_t n, int64_t t, int64_t b, int64_t j) const {
    return at[((layer * (3 * rnn.gates() + 2) + n) * steps + t) * batch * rnn.hidden + b * rnn.hidden + j];
  }
  double& gate(int64_t l, int64_t g, int64_t t, int64_t b, int64_t j) const { return part(l, g, t, b, j); }
  double& dz(int64_t l, int64_t g, int64_t t, int64_t b, int64_t j) const { return part(l, rnn.gates() + g, t, b, j); }
  double& dr(int64_t l, int64_t g, int64_t t, int64_t b, int64_t j) const {
    return part(l, 2 * rnn.gates() + g, t, b, j);
  }
  double& extra(int64_t l, int64_t t, int64_t b, int64_t j) const { return part(l, 3 * rnn.gates(), t, b, j); }
  double& y(int64_t l, int64_t t, int64_t b, int64_t j) const { return part(l, 3 * rnn.gates() + 1, t, b, j); }
};

size_t reserve_bytes(const Rnn& rnn, const Data& x) { return kStamp + 8 * Reserve(rnn, x, nullptr).numbers(); }
size_t work_bytes(const Rnn& rnn, const Data& x, bool training) { return (training ? 16 : 8) * x.batch + rnn.hidden; }

double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

// What a layer and direction sees at a step: of the inputs, or of the layer below.
double input_at(const Reserve& r, const View& x, int64_t layer, int64_t t, int64_t b, int64_t n) {
  if (!layer) return x[(t * r.batch + b) * r.rnn.inputs + n];
  const int64_t hidden = r.rnn.hidden, ways = r.rnn.directions();
  return r.y((layer - 1) * ways + n / hidden, t, b, n % hidden);
}

struct Walk {  // the steps of a sequence in the order of a direction
  int64_t length;
  bool backwards;
  int64_t step(int64_t n) const { return backwards ? length - 1 - n : n; }
};

int checked(const Rnn& rnn, const Data& x, const Data& y, const Tensor& carry, size_t weights, size_t work,
            size_t reserve, bool training) {
  if (x.data != rnn.data || y.data != rnn.data || carry.data != rnn.data) return kBadParam;
  if (x.size != rnn.inputs || y.size != rnn.directions() * rnn.hidden || x.lengths != y.lengths) return kBadParam;
  const int dims[] = {int(rnn.layers * rnn.directions()), int(x.batch), int(rnn.hidden)};
  if (carry.rank != 3 || std::memcmp(carry.dims, dims, sizeof dims)) return kBadParam;
  if (weights != size_t(rnn.weights() * bytes_of(rnn.data))) return kBadParam;
  if (work != work_bytes(rnn, x, training)) return kBadParam;
  if (training && reserve < reserve_bytes(rnn, x)) return kBadParam;
  for (int n : x.lengths)
    if (n < 1 || n > x.steps) return kBadParam;
  if (rnn.algorithm && !x.full()) return kNotSupported;
  return kSuccess;
}

}  // namespace

#define CUDNN extern "C" __attribute__((visibility("default")))

CUDNN const char* stand_in_calls() { return calls.c_str(); }
CUDNN void stand_in_forget() { calls.clear(); }

CUDNN int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
CUDNN int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &calls, 0; }
CUDNN int cuCtxPushCurrent_v2(void*) { return 0; }
CUDNN int cuCtxPopCurrent_v2(void**) { return 0; }
CUDNN int cuCtxGetCurrent(void** context) { return *context = &calls, 0; }
CUDNN int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void*) {
  record("cuMemcpyDtoHAsync_v2 bytes=%zu", bytes);
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return 0;
}
CUDNN int cuStreamSynchronize(void*) { return 0; }

CUDNN const char* cudnnGetErrorString(int status) {
  return status == kBadParam ? "CUDNN_STATUS_BAD_PARAM" : "CUDNN_STATUS_NOT_SUPPORTED";
}
CUDNN size_t cudnnGetVersion() {
#ifdef STAND_IN_VERSION
  return STAND_IN_VERSION;
#else
  return 91900;
#endif
}
CUDNN int cudnnCreate(void** handle) {
  record("cudnnCreate");
  *handle = new int;
  return kSuccess;
}
CUDNN int cudnnSetStream(void*, void*) { return kSuccess; }
CUDNN int cudnnCreateDropoutDescriptor(void** dropout) {
  *dropout = new int;
  return kSuccess;
}
CUDNN int cudnnSetDropoutDescriptor(void*, void*, float rate, void* states, size_t, unsigned long long) {
  return rate || states ? kNotSupported : kSuccess;
}
CUDNN int cudnnCreateTensorDescriptor(Tensor** tensor) {
  *tensor = new Tensor;
  return kSuccess;
}
CUDNN int cudnnDestroyTensorDescriptor(Tensor* tensor) {
  delete tensor;
  return kSuccess;
}
CUDNN int cudnnSetTensorNdDescriptor(Tensor* tensor, int data, int rank, const int* dims, const int* strides) {
  tensor->data = data, tensor->rank = rank;
  for (int n = 0; n < rank; n++) tensor->dims[n] = dims[n], tensor->strides[n] = strides[n];
  return kSuccess;
}
CUDNN int cudnnGetTensorNdDescriptor(Tensor* tensor, int room, int* data, int* rank, int* dims, int* strides) {
  *data = tensor->data, *rank = tensor->rank;
  for (int n = 0; n < room && n < tensor->rank; n++) dims[n] = tensor->dims[n], strides[n] = tensor->strides[n];
  return kSuccess;
}
CUDNN int cudnnCreateRNNDescriptor(Rnn** rnn) {
  *rnn = new Rnn{};
  return kSuccess;
}
CUDNN int cudnnDestroyRNNDescriptor(Rnn* rnn) {
  delete rnn;
  return kSuccess;
}
CUDNN int cudnnSetRNNDescriptor_v8(Rnn* rnn, int algorithm, int mode, int bias, int direction, int input, int data,
                                   int arithmetic, int math, int32_t inputs, int32_t hidden, int32_t projected,
                                   int32_t layers, void* dropout, uint32_t flags) {
  record("cudnnSetRNNDescriptor_v8 algorithm=%d mode=%d direction=%d data=%d arithmetic=%d math=%d inputs=%d hidden=%d "
         "layers=%d flags=%u",
         algorithm, mode, direction, data, arithmetic, math, inputs, hidden, layers, flags);
  *rnn = {algorithm, mode, bias, direction, input, data, arithmetic, math, inputs, hidden, projected, layers, flags};
  const bool known = data == kFloat || data == kHalf || data == kBfloat16;
  if (!known || arithmetic != kFloat || bias != 2 || input != 0 || projected != hidden || !dropout) return kBadParam;
  if (mode < kRelu || mode > kGru || direction < 0 || direction > 1 || hidden < 1 || inputs < 1) return kBadParam;
  if (math != 0 && math != 1 && math != 3) return kBadParam;
  if (algorithm == 1) return direction || layers > 1 ? kNotSupported : kSuccess;
  return algorithm == 0 || algorithm == 3 ? kSuccess : kNotSupported;
}
CUDNN int cudnnCreateRNNDataDescriptor(Data** data) {
  *data = new Data{};
  return kSuccess;
}
CUDNN int cudnnDestroyRNNDataDescriptor(Data* data) {
  delete data;
  return kSuccess;
}
CUDNN int cudnnSetRNNDataDescriptor(Data* to, int data, int layout, int steps, int batch, int size, const int* lengths,
                                    void* fill) {
  *to = {data, layout, steps, batch, size, std::vector<int>(lengths, lengths + batch)};
  if (layout != 0 || steps < 1 || batch < 1) return kBadParam;
  for (int64_t n = 0; n < bytes_of(data); n++)
    if (static_cast<char*>(fill)[n]) return kBadParam;
  return kSuccess;
}
CUDNN int cudnnGetRNNWeightSpaceSize(void*, Rnn* rnn, size_t* bytes) {
  *bytes = rnn->weights() * bytes_of(rnn->data);
  return kSuccess;
}
CUDNN int cudnnGetRNNTempSpaceSizes(void*, Rnn* rnn, int training, Data* x, size_t* work, size_t* reserve) {
  *work = work_bytes(*rnn, *x, training);
  if (reserve) *reserve = training ? reserve_bytes(*rnn, *x) : 0;
  return kSuccess;
}
CUDNN int cudnnGetRNNWeightParams(void*, Rnn* rnn, int32_t layer, size_t bytes, const void* weights, int32_t gate,
                                  Tensor* matrix, void** matrix_at, Tensor* bias, void** bias_at) {
  if (bytes != size_t(rnn->weights() * bytes_of(rnn->data)) || gate < 0 || gate >= 2 * rnn->gates()) return kBadParam;
  const bool recurrent = gate >= rnn->gates();
  const int rows = rnn->hidden, columns = recurrent ? rnn->hidden : rnn->features(layer / rnn->directions());
  const int64_t own = gate % rnn->gates(), item = bytes_of(rnn->data);
  char* const base = static_cast<char*>(const_cast<void*>(weights));
  *matrix_at = base + (rnn->matrix(layer, recurrent) + own * rows * columns) * item;
  *bias_at = base + (rnn->bias_at(layer, recurrent) + own * rows) * item;
  const int matrix_dims[] = {1, rows, columns}, bias_dims[] = {1, rows, 1};
  const int matrix_strides[] = {rows * columns, columns, 1}, bias_strides[] = {rows, 1, 1};
  cudnnSetTensorNdDescriptor(matrix, rnn->data, 3, matrix_dims, matrix_strides);
  return cudnnSetTensorNdDescriptor(bias, rnn->data, 3, bias_dims, bias_strides);
}

CUDNN int cudnnRNNForward(void*, Rnn* rnn, int training, const int32_t* lengths, Data* x_data, const void* x,
                          Data* y_data, void* y, Tensor* h_tensor, const void* h, void* last_h, Tensor* c_tensor,
                          const void* c, void* last_c, size_t weight_bytes, const void* weights, size_t work_given,
                          void*, size_t reserve_given, void* reserve) {
  record("cudnnRNNForward training=%d steps=%d batch=%d algorithm=%d math=%d full=%d", training, int(x_data->steps),
         int(x_data->batch), rnn->algorithm, rnn->math, int(x_data->full()));
  (void)c_tensor;
  if (lengths) return kBadParam;
  if (int status = checked(*rnn, *x_data, *y_data, *h_tensor, weight_bytes, work_given, reserve_given, training))
    return status;
  if (rnn->mode == kLstm && (!c || !last_c)) return kBadParam;
  std::vector<char> own;
  if (!training) {
    if (reserve || reserve_given) return kBadParam;
    own.resize(reserve_bytes(*rnn, *x_data));
    reserve = own.data();
  }
  const Reserve r(*rnn, *x_data, reserve);
  std::fill_n(r.at, r.numbers(), 0.0);
  const int64_t one = 1;
  std::memcpy(reserve, &one, sizeof one);
  auto view = [&](const void* at) { return View{const_cast<void*>(at), rnn->data}; };
  const View w = view(weights), xs = view(x), ys = view(y);
  const int64_t hidden = rnn->hidden, gates = rnn->gates(), ways = rnn->directions(), batch = x_data->batch;
  for (int64_t l = 0; l < rnn->layers * ways; l++) {
    const int64_t layer = l / ways, features = rnn->features(layer);
    const int64_t in = rnn->matrix(l, false), re = rnn->matrix(l, true);
    for (int64_t b = 0; b < batch; b++) {
      const Walk walk{x_data->lengths[b], l % ways == 1};
      std::vector<double> state(hidden), cell(hidden), z(gates * hidden), s(gates * hidden);
      for (int64_t j = 0; j < hidden; j++) state[j] = view(h)[(l * batch + b) * hidden + j];
      for (int64_t j = 0; j < hidden && rnn->mode == kLstm; j++) cell[j] = view(c)[(l * batch + b) * hidden + j];
      for (int64_t n = 0; n < walk.length; n++) {
        const int64_t t = walk.step(n);
        for (int64_t k = 0; k < gates * hidden; k++) {
          z[k] = w[rnn->bias_at(l, false) + k], s[k] = w[rnn->bias_at(l, true) + k];
          for (int64_t m = 0; m < features; m++) z[k] += w[in + k * features + m] * input_at(r, xs, layer, t, b, m);
          for (int64_t m = 0; m < hidden; m++) s[k] += w[re + k * hidden + m] * state[m];
        }
        for (int64_t j = 0; j < hidden; j++) {
          auto sum = [&](int64_t g) { return z[g * hidden + j] + s[g * hidden + j]; };
          auto gate = [&](int64_t g) -> double& { return r.gate(l, g, t, b, j); };
          double next;
          if (rnn->mode == kLstm) {
            for (int64_t g = 0; g < 4; g++) gate(g) = g == 2 ? std::tanh(sum(g)) : sigmoid(sum(g));
            cell[j] = gate(1) * cell[j] + gate(0) * gate(2);
            r.extra(l, t, b, j) = cell[j];
            next = gate(3) * std::tanh(cell[j]);
          } else if (rnn->mode == kGru) {
            gate(0) = sigmoid(sum(0)), gate(1) = sigmoid(sum(1));
            r.extra(l, t, b, j) = s[2 * hidden + j];
            gate(2) = std::tanh(z[2 * hidden + j] + gate(0) * s[2 * hidden + j]);
            next = (1 - gate(1)) * gate(2) + gate(1) * state[j];
          } else {
            next = gate(0) = rnn->mode == kTanh ? std::tanh(sum(0)) : std::fmax(sum(0), 0);
          }
          r.y(l, t, b, j) = next;
        }
        for (int64_t j = 0; j < hidden; j++) state[j] = r.y(l, t, b, j);
      }
      for (int64_t j = 0; j < hidden; j++) {
        view(last_h).set((l * batch + b) * hidden + j, state[j]);
        if (rnn->mode == kLstm) view(last_c).set((l * batch + b) * hidden + j, cell[j]);
      }
    }
  }
  for (int64_t t = 0; t < x_data->steps; t++)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t n = 0; n < ways * hidden; n++)
        ys.set((t * batch + b) * ways * hidden + n,
               t < x_data->lengths[b] ? r.y((rnn->layers - 1) * ways + n / hidden, t, b, n % hidden) : 0);
  return kSuccess;
}

CUDNN int cudnnRNNBackwardData_v8(void*, Rnn* rnn, const int32_t* lengths, Data* y_data, const void*, const void* dy,
                                  Data* x_data, void* dx, Tensor* h_tensor, const void* h, const void* dlast_h,
                                  void* dh, Tensor*, const void* c, const void* dlast_c, void* dc, size_t weight_bytes,
                                  const void* weights, size_t work_given, void*, size_t reserve_given, void* reserve) {
  record("cudnnRNNBackwardData_v8 algorithm=%d", rnn->algorithm);
  if (lengths) return kBadParam;
  if (int status = checked(*rnn, *x_data, *y_data, *h_tensor, weight_bytes, work_given, reserve_given, true))
    return status;
  int64_t stamp;
  std::memcpy(&stamp, reserve, sizeof stamp);
  if (stamp != 1) return kBadParam;  // not what the forward call left: something else has written to it
  stamp = 2;
  std::memcpy(reserve, &stamp, sizeof stamp);
  const Reserve r(*rnn, *x_data, reserve);
  auto view = [&](const void* at) { return View{const_cast<void*>(at), rnn->data}; };
  const View w = view(weights);
  const int64_t hidden = rnn->hidden, gates = rnn->gates(), ways = rnn->directions(), batch = x_data->batch;
  const int64_t steps = x_data->steps;
  std::vector<double> above(steps * batch * ways * hidden);
  for (size_t n = 0; n < above.size(); n++) above[n] = view(dy)[n];
  for (int64_t layer = rnn->layers - 1; layer >= 0; layer--) {
    const int64_t features = rnn->features(layer);
    std::vector<double> below(steps * batch * features);
    for (int64_t way = 0; way < ways; way++) {
      const int64_t l = layer * ways + way;
      for (int64_t b = 0; b < batch; b++) {
        const Walk walk{x_data->lengths[b], way == 1};
        std::vector<double> dstate(hidden), dcell(hidden), before(hidden);
        for (int64_t j = 0; j < hidden; j++) dstate[j] = view(dlast_h)[(l * batch + b) * hidden + j];
        for (int64_t j = 0; j < hidden && rnn->mode == kLstm; j++)
          dcell[j] = view(dlast_c)[(l * batch + b) * hidden + j];
        for (int64_t n = walk.length - 1; n >= 0; n--) {
          const int64_t t = walk.step(n), first = n == 0, previous = first ? 0 : walk.step(n - 1);
          for (int64_t j = 0; j < hidden; j++) {
            auto gate = [&](int64_t g) { return r.gate(l, g, t, b, j); };
            const double d = dstate[j] + above[(t * batch + b) * ways * hidden + way * hidden + j];
            double dz[4] = {}, dr[4];
            before[j] = 0;
            if (rnn->mode == kLstm) {
              const double old = first ? view(c)[(l * batch + b) * hidden + j] : r.extra(l, previous, b, j);
              const double bent = std::tanh(r.extra(l, t, b, j));
              const double d_cell = dcell[j] + d * gate(3) * (1 - bent * bent);
              dz[0] = d_cell * gate(2) * gate(0) * (1 - gate(0));
              dz[1] = d_cell * old * gate(1) * (1 - gate(1));
              dz[2] = d_cell * gate(0) * (1 - gate(2) * gate(2));
              dz[3] = d * bent * gate(3) * (1 - gate(3));
              dcell[j] = d_cell * gate(1);
            } else if (rnn->mode == kGru) {
              const double old = first ? view(h)[(l * batch + b) * hidden + j] : r.y(l, previous, b, j);
              dz[1] = d * (old - gate(2)) * gate(1) * (1 - gate(1));
              dz[2] = d * (1 - gate(1)) * (1 - gate(2) * gate(2));
              dz[0] = dz[2] * r.extra(l, t, b, j) * gate(0) * (1 - gate(0));
              before[j] = d * gate(1);
            } else {
              dz[0] = d * (rnn->mode == kTanh ? 1 - gate(0) * gate(0) : gate(0) > 0);
            }
            for (int64_t g = 0; g < gates; g++) {
              dr[g] = rnn->mode == kGru && g == 2 ? dz[2] * gate(0) : dz[g];
              r.dz(l, g, t, b, j) = dz[g], r.dr(l, g, t, b, j) = dr[g];
            }
          }
          const int64_t in = rnn->matrix(l, false), re = rnn->matrix(l, true);
          for (int64_t k = 0; k < gates * hidden; k++) {
            const double dz = r.dz(l, k / hidden, t, b, k % hidden), dr = r.dr(l, k / hidden, t, b, k % hidden);
            for (int64_t m = 0; m < hidden; m++) before[m] += dr * w[re + k * hidden + m];
            for (int64_t m = 0; m < features; m++)
              below[(t * batch + b) * features + m] += dz * w[in + k * features + m];
          }
          dstate = before;
        }
        for (int64_t j = 0; j < hidden; j++) {
          view(dh).set((l * batch + b) * hidden + j, dstate[j]);
          if (rnn->mode == kLstm) view(dc).set((l * batch + b) * hidden + j, dcell[j]);
        }
      }
    }
    above = below;
  }
  for (int64_t t = 0; t < steps; t++)
    for (int64_t b = 0; b < batch; b++)
      for (int64_t m = 0; m < rnn->inputs; m++) {
        const int64_t at = (t * batch + b) * rnn->inputs + m;
        view(dx).set(at, t < x_data->lengths[b] ? above[at] : kNaN);
      }
  return kSuccess;
}

CUDNN int cudnnRNNBackwardWeights_v8(void*, Rnn* rnn, int add, const int32_t* lengths, Data* x_data, const void* x,
                                     Tensor* h_tensor, const void* h, Data* y_data, const void*, size_t weight_bytes,
                                     void* dweights, size_t work_given, void*, size_t reserve_given, void* reserve) {
  record("cudnnRNNBackwardWeights_v8 algorithm=%d", rnn->algorithm);
  if (lengths || add != 0) return kBadParam;
  if (int status = checked(*rnn, *x_data, *y_data, *h_tensor, weight_bytes, work_given, reserve_given, true))
    return status;
  int64_t stamp;
  std::memcpy(&stamp, reserve, sizeof stamp);
  if (stamp != 2) return kBadParam;
  const Reserve r(*rnn, *x_data, reserve);
  auto view = [&](const void* at) { return View{const_cast<void*>(at), rnn->data}; };
  const View xs = view(x), dw = view(dweights);
  const int64_t hidden = rnn->hidden, gates = rnn->gates(), ways = rnn->directions(), batch = x_data->batch;
  std::vector<double> sums(rnn->weights());
  for (int64_t l = 0; l < rnn->layers * ways; l++) {
    const int64_t features = rnn->features(l / ways), in = rnn->matrix(l, false), re = rnn->matrix(l, true);
    for (int64_t b = 0; b < batch; b++) {
      const Walk walk{x_data->lengths[b], l % ways == 1};
      for (int64_t n = 0; n < walk.length; n++) {
        const int64_t t = walk.step(n);
        for (int64_t k = 0; k < gates * hidden; k++) {
          const double dz = r.dz(l, k / hidden, t, b, k % hidden), dr = r.dr(l, k / hidden, t, b, k % hidden);
          sums[rnn->bias_at(l, false) + k] += dz, sums[rnn->bias_at(l, true) + k] += dr;
          for (int64_t m = 0; m < features; m++) sums[in + k * features + m] += dz * input_at(r, xs, l / ways, t, b, m);
          for (int64_t m = 0; m < hidden; m++)
            sums[re + k * hidden + m] +=
                dr * (n ? r.y(l, walk.step(n - 1), b, m) : view(h)[(l * batch + b) * hidden + m]);
        }
      }
    }
  }
  for (size_t n = 0; n < sums.size(); n++) dw.set(n, dw[n] + sums[n]);
  return kSuccess;
}
