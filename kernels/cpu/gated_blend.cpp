// Residual add with gated prompt rows, and its gradients, on the CPU.
//   y = x + delta;  y[:, start:start+length] = gate * y + (1 - gate) * prompt_in
// One pass over memory instead of eager's five or six. Schemas are defined in kernels/native.py.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>

#include "element.h"
#include "half.h"
#include "multiversion.h"
#include "rows.h"

namespace fastprompt {
namespace {

// ---- runs of contiguous elements ----

template <typename T>
FASTPROMPT_INLINE void add_body(const T* __restrict x, const T* __restrict delta, T* __restrict y, int64_t count) {
  using E = Element<T>;
  for (int64_t i = 0; i < count; ++i) {
    y[i] = E::store(E::load(x[i]) + E::load(delta[i]));
  }
}

template <typename T>
FASTPROMPT_INLINE void blend_body(const T* __restrict x, const T* __restrict delta, const T* __restrict prompt,
                                  T* __restrict y, int64_t count, Acc<T> gate, Acc<T> keep) {
  using E = Element<T>;
  for (int64_t i = 0; i < count; ++i) {
    const Acc<T> sum = E::load(x[i]) + E::load(delta[i]);
    y[i] = E::store(gate * sum + keep * E::load(prompt[i]));
  }
}

template <typename T>
FASTPROMPT_INLINE void scale_body(const T* __restrict x, T* __restrict y, int64_t count, Acc<T> factor) {
  using E = Element<T>;
  for (int64_t i = 0; i < count; ++i) {
    y[i] = E::store(factor * E::load(x[i]));
  }
}

// Sixteen partial sums in a fixed order, for every clone and every thread count.
template <typename T, typename U>
FASTPROMPT_INLINE double dot_body(const T* __restrict a, const U* __restrict b, int64_t count) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += double{Element<T>::load(a[i + lane])} * double{Element<U>::load(b[i + lane])};
    }
  }
  double total = 0;
  for (; i < count; ++i) {
    total += double{Element<T>::load(a[i])} * double{Element<U>::load(b[i])};
  }
  for (const double sum : sums) {
    total += sum;
  }
  return total;
}

// target_clones does not apply to templates: one overload for each element type.
#define FASTPROMPT_RUNS(T)                                                                                    \
  FASTPROMPT_CLONES void add_run(const T* x, const T* delta, T* y, int64_t count) {                           \
    add_body(x, delta, y, count);                                                                             \
  }                                                                                                           \
  FASTPROMPT_CLONES void blend_run(const T* x, const T* delta, const T* prompt, T* y, int64_t count,          \
                                   Acc<T> gate, Acc<T> keep) {                                                \
    blend_body(x, delta, prompt, y, count, gate, keep);                                                       \
  }                                                                                                           \
  FASTPROMPT_CLONES void scale_run(const T* x, T* y, int64_t count, Acc<T> factor) {                          \
    scale_body(x, y, count, factor);                                                                          \
  }
#define FASTPROMPT_DOT(T, U) \
  FASTPROMPT_CLONES double dot_run(const T* a, const U* b, int64_t count) { return dot_body(a, b, count); }

FASTPROMPT_RUNS(float)
FASTPROMPT_RUNS(double)
FASTPROMPT_RUNS(BFloat16)
FASTPROMPT_DOT(float, float)
FASTPROMPT_DOT(double, double)
FASTPROMPT_DOT(BFloat16, BFloat16)
FASTPROMPT_DOT(BFloat16, float)

// Halves are converted to floats, block by block.

void add_run(const Half* x, const Half* delta, Half* y, int64_t count) {
  float x_block[kHalfBlock], delta_block[kHalfBlock], y_block[kHalfBlock];
  for (int64_t i = 0; i < count; i += kHalfBlock) {
    const int64_t size = std::min(kHalfBlock, count - i);
    load_halves(x + i, x_block, size);
    load_halves(delta + i, delta_block, size);
    add_run(x_block, delta_block, y_block, size);
    store_halves(y_block, y + i, size);
  }
}

void blend_run(const Half* x, const Half* delta, const Half* prompt, Half* y, int64_t count, float gate, float keep) {
  float x_block[kHalfBlock], delta_block[kHalfBlock], prompt_block[kHalfBlock], y_block[kHalfBlock];
  for (int64_t i = 0; i < count; i += kHalfBlock) {
    const int64_t size = std::min(kHalfBlock, count - i);
    load_halves(x + i, x_block, size);
    load_halves(delta + i, delta_block, size);
    load_halves(prompt + i, prompt_block, size);
    blend_run(x_block, delta_block, prompt_block, y_block, size, gate, keep);
    store_halves(y_block, y + i, size);
  }
}

void scale_run(const Half* x, Half* y, int64_t count, float factor) {
  float x_block[kHalfBlock], y_block[kHalfBlock];
  for (int64_t i = 0; i < count; i += kHalfBlock) {
    const int64_t size = std::min(kHalfBlock, count - i);
    load_halves(x + i, x_block, size);
    scale_run(x_block, y_block, size, factor);
    store_halves(y_block, y + i, size);
  }
}

template <typename U>
double dot_run(const Half* a, const U* b, int64_t count) {
  float a_block[kHalfBlock], b_block[kHalfBlock];
  double total = 0;
  for (int64_t i = 0; i < count; i += kHalfBlock) {
    const int64_t size = std::min(kHalfBlock, count - i);
    load_halves(a + i, a_block, size);
    if constexpr (std::is_same_v<U, Half>) {
      load_halves(b + i, b_block, size);
      total += dot_run(a_block, b_block, size);
    } else {
      total += dot_run(a_block, b + i, size);
    }
  }
  return total;
}

// ---- arguments ----

void check_element_type(const char* op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(with_element_type(dtype, [](auto) {}), "`", op, "`: `", name,
                  "` must be float32, float64, bfloat16 or float16; got ", torch::headeronly::toString(dtype),
                  "; cast it");
}

void check_rows(const char* op, const char* name, const Tensor& tensor, int64_t images, int64_t rows, int64_t width,
                ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.dim() == 3 && tensor.size(0) == images && tensor.size(1) == rows && tensor.size(2) == width, "`", op,
      "`: `", name, "` must be (", images, ", ", rows, ", ", width, "); got ", shape_of(tensor), "; expand or slice it");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "`", op, "`: `", name, "` must be ",
                  torch::headeronly::toString(dtype), " like the first argument; got ",
                  torch::headeronly::toString(tensor.scalar_type()), "; cast it");
}

void check_prompt_rows(const char* op, int64_t start, int64_t length, int64_t rows) {
  STD_TORCH_CHECK(start >= 0 && length >= 0 && start <= rows && length <= rows - start, "`", op, "`: `start`=", start,
                  " and `length`=", length, " must name rows within the ", rows,
                  " of the first argument; pass where the prompt rows are");
}

double read_gate(const char* op, const Tensor& gate) {
  STD_TORCH_CHECK(gate.numel() == 1, "`", op, "`: `gate` must hold one element; got ", shape_of(gate),
                  "; call once for each gate");
  check_element_type(op, "gate", gate.scalar_type());
  double value = 0;
  with_element_type(gate.scalar_type(), [&](auto element) {
    using T = decltype(element);
    value = Element<T>::load(*static_cast<const T*>(gate.const_data_ptr()));
  });
  return value;
}

// ---- forward ----

template <typename T>
void gated_blend_rows(const Tensor& x, const Tensor& delta, const Tensor& prompt_in, double gate, int64_t start,
                      int64_t length, Tensor& out) {
  const int64_t images = x.size(0), rows = x.size(1), width = x.size(2);
  const RowReader<T> x_rows(x), delta_rows(delta), prompt_rows(prompt_in);
  const bool add_adjoins = x_rows.rows_adjoin() && delta_rows.rows_adjoin();
  const bool blend_adjoins = add_adjoins && prompt_rows.rows_adjoin();
  const auto gate_acc = static_cast<Acc<T>>(gate);
  const auto keep_acc = static_cast<Acc<T>>(1.0 - gate);
  T* const y = static_cast<T*>(out.mutable_data_ptr());

  torch::stable::parallel_for(0, images * rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    std::vector<T> x_scratch, delta_scratch, prompt_scratch;
    for (int64_t at = begin; at < end;) {
      const int64_t image = at / rows, row = at % rows;
      const bool is_prompt = row >= start && row < start + length;
      const int64_t kind_end = is_prompt ? start + length : (row < start ? start : rows);
      const int64_t left = std::min(kind_end - row, end - at);
      const int64_t step = (is_prompt ? blend_adjoins : add_adjoins) ? left : 1;
      const T* const x_run = x_rows.row(image, row, x_scratch);
      const T* const delta_run = delta_rows.row(image, row, delta_scratch);
      if (is_prompt) {
        const T* const prompt_run = prompt_rows.row(image, row - start, prompt_scratch);
        blend_run(x_run, delta_run, prompt_run, y + at * width, step * width, gate_acc, keep_acc);
      } else {
        add_run(x_run, delta_run, y + at * width, step * width);
      }
      at += step;
    }
  });
}

Tensor gated_blend(const Tensor x, const Tensor delta, const Tensor prompt_in, const Tensor gate, int64_t start,
                   int64_t length) {
  constexpr const char* op = "gated_blend";
  STD_TORCH_CHECK(x.dim() == 3, "`", op, "`: `x` must be [B, N, D]; got ", shape_of(x), "; reshape it");
  check_element_type(op, "x", x.scalar_type());
  const int64_t images = x.size(0), rows = x.size(1), width = x.size(2);
  const ScalarType dtype = x.scalar_type();
  check_prompt_rows(op, start, length, rows);
  check_rows(op, "delta", delta, images, rows, width, dtype);
  check_rows(op, "prompt_in", prompt_in, images, length, width, dtype);
  const double gate_value = read_gate(op, gate);

  Tensor out = empty_cpu({images, rows, width}, dtype);
  with_element_type(dtype, [&](auto element) {
    if (out.numel() > 0) {
      gated_blend_rows<decltype(element)>(x, delta, prompt_in, gate_value, start, length, out);
    }
  });
  return out;
}

// ---- backward ----

/// Where the gradients go; a null pointer stands for one that is not needed.
template <typename T>
struct GradTargets {
  T* input;
  T* prompt;
  double* row_sums;  // grad . difference, one for each prompt row
};

template <typename T, typename U>
void grad_rows(const Tensor& grad, const RowReader<U>* difference, double gate, int64_t start, int64_t length,
               const GradTargets<T>& to) {
  const int64_t images = grad.size(0), rows = grad.size(1), width = grad.size(2);
  const RowReader<T> grad_reader(grad);
  const auto gate_acc = static_cast<Acc<T>>(gate);
  const auto keep_acc = static_cast<Acc<T>>(1.0 - gate);

  // One parallel region for all three, because waking threads takes longer than the arithmetic of a small tensor.
  torch::stable::parallel_for(0, images * rows, grain_rows(width), [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    std::vector<U> difference_scratch;
    for (int64_t at = begin; at < end;) {
      const int64_t image = at / rows, row = at % rows;
      if (row >= start && row < start + length) {
        const T* const run = grad_reader.row(image, row, scratch);
        const int64_t prompt_at = image * length + row - start;
        if (to.input != nullptr) {
          scale_run(run, to.input + at * width, width, gate_acc);
        }
        if (to.prompt != nullptr) {
          scale_run(run, to.prompt + prompt_at * width, width, keep_acc);
        }
        if (to.row_sums != nullptr) {
          to.row_sums[prompt_at] = dot_run(run, difference->row(image, row - start, difference_scratch), width);
        }
        ++at;
        continue;
      }
      const int64_t left = std::min((row < start ? start : rows) - row, end - at);
      if (to.input == nullptr) {
        at += left;
        continue;
      }
      const int64_t step = grad_reader.rows_adjoin() ? left : 1;
      std::memcpy(to.input + at * width, grad_reader.row(image, row, scratch), step * width * sizeof(T));
      at += step;
    }
  });
}

Tensor scalar_like(const Tensor& like, double value) {
  Tensor out = empty_cpu(like.sizes(), like.scalar_type());
  with_element_type(like.scalar_type(), [&](auto element) {
    using T = decltype(element);
    *static_cast<T*>(out.mutable_data_ptr()) = Element<T>::store(static_cast<Acc<T>>(value));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gated_blend_backward(const Tensor grad, const Tensor gate,
                                                        const std::optional<Tensor> difference, int64_t start,
                                                        int64_t length, bool need_input, bool need_prompt,
                                                        bool need_gate) {
  constexpr const char* op = "gated_blend_backward";
  STD_TORCH_CHECK(grad.dim() == 3, "`", op, "`: `grad` must be [B, N, D]; got ", shape_of(grad), "; reshape it");
  check_element_type(op, "grad", grad.scalar_type());
  const int64_t images = grad.size(0), rows = grad.size(1), width = grad.size(2);
  const ScalarType dtype = grad.scalar_type();
  check_prompt_rows(op, start, length, rows);
  const double gate_value = read_gate(op, gate);
  STD_TORCH_CHECK(!need_gate || difference.has_value(), "`", op,
                  "`: `need_gate` needs `difference`, x + delta - prompt_in on the prompt rows; got None; pass it");
  // For 16-bit gradients the difference may be float32: rounding it would make the gate's gradient less precise.
  const bool wide_difference = need_gate && dtype != ScalarType::Double && dtype != ScalarType::Float &&
                               difference->scalar_type() == ScalarType::Float;
  if (need_gate) {
    check_rows(op, "difference", *difference, images, length, width, wide_difference ? ScalarType::Float : dtype);
  }

  Tensor grad_input = need_input ? empty_cpu({images, rows, width}, dtype) : empty_cpu({0}, dtype);
  Tensor grad_prompt = need_prompt ? empty_cpu({images, length, width}, dtype) : empty_cpu({0}, dtype);
  std::vector<double> row_sums(need_gate ? images * length : 0);
  with_element_type(dtype, [&](auto element) {
    using T = decltype(element);
    const GradTargets<T> to{need_input ? static_cast<T*>(grad_input.mutable_data_ptr()) : nullptr,
                            need_prompt ? static_cast<T*>(grad_prompt.mutable_data_ptr()) : nullptr,
                            need_gate ? row_sums.data() : nullptr};
    const auto run = [&]<typename U>(U) {
      const auto reader = need_gate ? std::optional<RowReader<U>>(*difference) : std::nullopt;
      grad_rows<T, U>(grad, reader ? &*reader : nullptr, gate_value, start, length, to);
    };
    if (grad.numel() == 0) {
      return;
    }
    if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
      wide_difference ? run(float{}) : run(T{});
    } else {
      run(T{});
    }
  });
  // Added up in row order: the same bits for every thread count.
  const double gate_sum = std::accumulate(row_sums.begin(), row_sums.end(), 0.0);
  Tensor grad_gate = need_gate ? scalar_like(gate, gate_sum) : empty_cpu({0}, gate.scalar_type());
  return {grad_input, grad_prompt, grad_gate};
}

}  // namespace
}  // namespace fastprompt

STABLE_TORCH_LIBRARY_IMPL(fastprompt_cpu, CPU, m) {
  m.impl("gated_blend", TORCH_BOX(&fastprompt::gated_blend));
  m.impl("gated_blend_backward", TORCH_BOX(&fastprompt::gated_blend_backward));
}
