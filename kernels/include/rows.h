#pragma once
// Strided [B, N, D] tensors as runs of rows.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace fastprompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return aoti_torch_dtype_float32();
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float16();
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

/// A contiguous, uninitialised tensor. The C entry point skips the dispatcher: a microsecond less than `empty`.
inline Tensor empty_cpu(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(1, sizes[i]);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), shim_dtype(dtype), aoti_torch_device_type_cpu(),
      0, &handle));
  return Tensor(handle);
}

/// The minimum number of elements per thread for which another thread is worth waking (torch's own grain).
constexpr int64_t kGrainElements = 32768;

inline int64_t grain_rows(int64_t width) {
  return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, width));
}

/// Read access to the rows of a [B, N, D] tensor with any strides. Rows with a strided last dimension are
/// gathered into a scratch row first, so that the arithmetic sees contiguous elements only.
template <typename T>
class RowReader {
 public:
  explicit RowReader(const Tensor& tensor)
      : data_(static_cast<const T*>(tensor.const_data_ptr())),
        width_(tensor.size(2)),
        stride_image_(tensor.stride(0)),
        stride_row_(tensor.stride(1)),
        stride_element_(tensor.stride(2)) {}

  /// Whether consecutive rows of one image form a single run of memory.
  bool rows_adjoin() const { return elements_adjoin() && stride_row_ == width_; }

  /// Row `row` of image `image`; valid until the next call with the same scratch.
  const T* row(int64_t image, int64_t row, std::vector<T>& scratch) const {
    const T* first = data_ + image * stride_image_ + row * stride_row_;
    if (elements_adjoin()) {
      return first;
    }
    scratch.resize(width_);
    for (int64_t i = 0; i < width_; ++i) {
      scratch[i] = first[i * stride_element_];
    }
    return scratch.data();
  }

 private:
  bool elements_adjoin() const { return stride_element_ == 1 || width_ <= 1; }

  const T* data_;
  int64_t width_, stride_image_, stride_row_, stride_element_;
};

}  // namespace fastprompt
