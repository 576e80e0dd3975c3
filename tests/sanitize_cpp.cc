// Runs the loops of the cell above on arrays of exactly their sizes, for sanitizers to look at.  Argument: how many runs.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace rnn {

// Threads that begin at once and are waited for at the end.
struct Pool {
  std::vector<std::thread> all;
  int64_t num_threads() const { return 4; }
  template <class F>
  void Schedule(F&& body) {
    all.emplace_back(std::forward<F>(body));
  }
  ~Pool() {
    for (auto& one : all) one.join();
  }
};

std::mt19937 rng(1);
int64_t upto(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n)(rng); }
bool maybe() { return upto(1); }

// An array whose ends are those of its memory; a null pointer for no elements.
template <class T>
struct Exact {
  std::unique_ptr<T[]> data;
  int64_t size;
  explicit Exact(int64_t n) : data(n ? new T[n] : nullptr), size(n) {}
  T* get() const { return data.get(); }
};
template <class T>
Exact<T> normal(int64_t n, double scale) {
  Exact<T> a(n);
  for (int64_t k = 0; k < n; k++) {
    const vec one = all(real(std::normal_distribution<double>(0, scale)(rng)));
    T lanes[kLanes];
    store(lanes, one);
    a.get()[k] = lanes[0];
  }
  return a;
}
Exact<bool> booleans(int64_t n) {
  Exact<bool> a(n);
  for (int64_t k = 0; k < n; k++) a.get()[k] = upto(3) == 0;
  return a;
}
template <class T>
double number(T x) {
  T lanes[kLanes] = {x};
  return load(lanes)[0];
}
template <class T>
bool close(const char* what, const Exact<T>& a, const Exact<T>& b, double tolerance) {
  double largest = 1, error = 0;
  for (int64_t k = 0; k < a.size; k++) {
    const double x = number(a.get()[k]), y = number(b.get()[k]);
    largest = std::max(largest, std::abs(y)), error = std::max(error, std::abs(x - y));
    if (!std::isfinite(x)) error = HUGE_VAL;
  }
  if (error > tolerance * largest) std::printf("%s: error %g of %g\n", what, error, largest);
  return error <= tolerance * largest;
}

bool one_run() {
  const bool diagonal = maybe(), large = upto(5) == 0;
  const int64_t heads = diagonal ? 1 : 1 + upto(2), head = 1 + upto(large ? 150 : 40), T = 1 + upto(large ? 12 : 30);
  const int64_t groups = 1 + upto(1), B = groups * (1 + upto(9)), D = 1 + upto(40), H = heads * head;
  const int64_t F = Cell::fields, G = kGates, every = 1 + upto(T);
  const int64_t rank = heads > 1 || diagonal || maybe() ? 0 : 1 + upto(head - 1);
  const Sizes s(T, B, D, H, heads, rank, diagonal, maybe());
  const double scale = 0.5 / std::sqrt(double(s.depth));
  const auto x = normal<stored>(T * B * D, 1);
  const auto w = normal<real>(D * G * H, 0.3), u = normal<real>(s.depth * G * H, scale),
             readouts = normal<real>(rank * H, 0.5 / std::sqrt(double(H))), bias = normal<real>(G * H, 1),
             rest_bias = normal<real>(Cell::rest * H, 1), units = normal<real>(Cell::units * H, 0.3),
             start = normal<real>(F * B * H, 1), target = normal<real>(F * B * H, 1),
             mask = normal<real>(maybe() ? B * H : 0, 1), shares = normal<real>(T * B * H, 0.2);
  const auto resets = booleans(maybe() ? T * B : 0), chosen = booleans(T * B * H);
  Exact<int32_t> lengths(maybe() ? B : 0);
  for (int64_t k = 0; k < lengths.size; k++) lengths.get()[k] = int32_t(upto(T));
  Zoneout zoneout;
  zoneout.any = maybe();
  for (int f = 0; f < F; f++) {
    zoneout.kinds[f] = Zoneout::Kind(zoneout.any ? upto(3) : 0);
    zoneout.share[f] = real(0.3), zoneout.chosen[f] = chosen.get(), zoneout.shares[f] = shares.get();
  }
  const Inputs in{x.get(),     w.get(),     u.get(),      readouts.get(), bias.get(),    rest_bias.get(),
                  units.get(), start.get(), target.get(), mask.get(),     lengths.get(), resets.get(), zoneout};

  const int64_t states_of = Cell::states ? (F - 1 + Cell::emitted) * T * B * H : 0;
  const auto dy = normal<stored>(maybe() ? T * B * H : 0, 1), dstates = normal<stored>(maybe() ? states_of : 0, 1);
  const auto dlast = normal<real>(F * B * H, 1);
  struct Results {
    Exact<stored> y, states, dx;
    Exact<real> last, w, u, readouts, bias, rest_bias, units, start, target;
  };
  const auto run = [&](int64_t every, bool again) {
    Results all{Exact<stored>(T * B * H),    Exact<stored>(states_of),        Exact<stored>(T * B * D),
                Exact<real>(F * B * H),      Exact<real>(groups * w.size),    Exact<real>(groups * u.size),
                Exact<real>(groups * readouts.size), Exact<real>(groups * G * H),
                Exact<real>(groups * rest_bias.size), Exact<real>(groups * units.size),
                Exact<real>(F * B * H),      Exact<real>(resets.size ? F * B * H : 0)};
    Exact<residual> kept(again ? 0 : Residuals::size(s, T * B));
    Exact<real> carries((T + every - 1) / every * B * Begins::fields(again) * s.units);
    const Begins begins{carries.get(), every, again};
    const Outputs out{all.y.get(), all.states.get(), all.last.get(), begins};
    {
      Pool pool;
      if (again)
        run_forward<false>(pool, s, in, out, nullptr);
      else
        run_forward<true>(pool, s, in, out, kept.get());
    }
    Pool pool;
    run_backward(pool, groups, s, in, all.y.get(), kept.get(), begins,
                 {dy.get(), dstates.get(), dlast.get()},
                 {all.dx.get(), all.w.get(), all.u.get(), all.readouts.get(), all.bias.get(), all.rest_bias.get(),
                  all.units.get(), all.start.get(), all.target.get()});
    return all;
  };
  const Results a = run(every, false), b = run(1 + upto(T), true);
  // In fewer bits the gradients of what is kept and of what is run again are those of that many bits.
  const double same = std::is_same_v<residual, real> ? 1e-4 : 0.05;  // chunks of other lengths sum in another order
  return close("y", a.y, b.y, 0) & close("states", a.states, b.states, 0) & close("last", a.last, b.last, 0) &
         close("dx", a.dx, b.dx, same) & close("dw", a.w, b.w, same) & close("du", a.u, b.u, same) &
         close("dreadouts", a.readouts, b.readouts, same) & close("dbias", a.bias, b.bias, same) &
         close("drest", a.rest_bias, b.rest_bias, same) &
         close("dunits", a.units, b.units, same) & close("dstart", a.start, b.start, same) &
         close("dtarget", a.target, b.target, same);
}

}  // namespace rnn

int main(int, char** arguments) {
  for (int n = 0, runs = std::atoi(arguments[1]); n < runs; n++)
    if (!rnn::one_run()) return std::printf("run %d differs\n", n), 1;
  std::puts("ok");
}
