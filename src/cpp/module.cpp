// The Python face of the core. Tensors come as (address, strides): the core links no torch, so
// one build serves every torch release.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "alpha.h"
#include "attention.h"
#include "decoding.h"
#include "entmax_rows.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using namespace adasplash2;

namespace {

using Address = std::uintptr_t;
// (address, batch stride, head stride, length stride), strides in elements.
using Tensor = std::array<std::int64_t, 4>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

TensorRef tensor_ref(const Tensor& t) {
  return {pointer<void>(static_cast<Address>(t[0])), t[1], t[2], t[3]};
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "bfloat16") return Dtype::kBfloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw std::invalid_argument("dtype must be float32, float64, bfloat16 or float16, got '" + name +
                              "'");
}

// (address, dtype, strides of batch, query head, row and key), strides in elements and 0 where one
// entry holds for all.
using OperandArgument = std::tuple<Address, std::string, std::array<std::int64_t, 4>>;
using Operands = std::map<std::string, OperandArgument>;

Dtype operand_dtype_of(const std::string& name) {
  if (name == "bool") return Dtype::kBool;
  if (name == "int32") return Dtype::kInt32;
  if (name == "int64") return Dtype::kInt64;
  return dtype_of(name);
}

Operand operand_of(const Operands& operands, const char* name) {
  const auto found = operands.find(name);
  if (found == operands.end()) return {};
  const auto& [address, dtype, strides] = found->second;
  return {pointer<void>(address),
          operand_dtype_of(dtype),
          strides[0],
          strides[1],
          strides[2],
          strides[3]};
}

// (address of int32 (batch, pages), batch stride, rows of a page, pages of the cache).
using BlockTableArgument = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;

BlockTable block_table_of(const std::optional<BlockTableArgument>& table) {
  if (!table) return {};
  const auto& [address, stride, page_size, pages] = *table;
  if (page_size < 1) throw std::invalid_argument("page_size must be at least 1");
  return {pointer<std::int32_t>(address), stride, page_size, pages};
}

// What is asked of an attention, and what that points to.
struct Asked {
  AttentionProblem problem = {};
  std::vector<Alpha> alphas;

  Asked(const std::array<std::int64_t, 7>& dims, const std::string& dtype, double alpha,
        double scale, bool is_causal, const std::array<std::int64_t, 2>& window, std::int64_t shift,
        double softcap, double dropout_p, const Operands& operands) {
    AttentionProblem& p = problem;
    p.batch = dims[0];
    p.heads_q = dims[1];
    p.heads_kv = dims[2];
    p.length_q = dims[3];
    p.length_k = dims[4];
    p.head_dim = dims[5];
    p.head_dim_v = dims[6];
    p.dtype = dtype_of(dtype);
    // Keys, and rows within a group, are numbered in 32 bits.
    if (p.length_k > INT32_MAX - 64 || p.group_rows() > INT32_MAX - 64)
      throw std::invalid_argument("length_k and gqa_group * length_q must be below 2^31");
    Score& s = p.score;
    s.scale = scale;
    s.softcap = softcap;
    s.length_k = p.length_k;
    s.set_window(is_causal, window[0], window[1]);
    s.shift = shift;
    s.dropout_p = dropout_p;
    s.compute_dtype = p.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
    s.mask = operand_of(operands, "attn_mask");
    s.slopes = operand_of(operands, "alibi_slopes");
    s.sinks = operand_of(operands, "sinks");
    s.scales = operand_of(operands, "scales");
    s.begins = operand_of(operands, "begins");
    s.ends = operand_of(operands, "ends");
    s.places = operand_of(operands, "places");
    s.seeds = operand_of(operands, "dropout_seed");
    s.blocks_per_head = p.row_blocks_per_head();
    s.find_plain();
    set_alphas(alpha, operand_of(operands, "alphas"));
  }
  Asked(const Asked&) = delete;

 private:
  void set_alphas(double alpha, const Operand& operand) {
    if (!operand.data) {
      alphas.push_back(alpha_of(alpha));
    } else {
      const std::int64_t batches = operand.stride_batch ? problem.batch : 1;
      const std::int64_t heads = operand.stride_head ? problem.heads_q : 1;
      for (std::int64_t batch = 0; batch < batches; ++batch)
        for (std::int64_t head = 0; head < heads; ++head)
          alphas.push_back(alpha_or_nan(number_at(operand.at(batch, head), operand.dtype, 0)));
      problem.alpha_stride_batch = batches > 1 ? heads : 0;
      problem.alpha_stride_head = heads > 1 ? 1 : 0;
    }
    problem.alphas = alphas.data();
  }
};

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "C++ core of adasplash2.";
  m.attr("EMPTY_TILE") = int(kEmptyTile);
  m.attr("LIVE_TILE") = int(kLiveTile);
  m.attr("LIST_CAPACITY") = kListCapacity;
  m.attr("SAVED_ALIGNMENT") = kSavedAlignment;
#if defined(_OPENMP)
  m.attr("OPENMP") = true;
#else
  m.attr("OPENMP") = false;
#endif
  m.attr("TILE_ROWS") = kBlockRows;

  m.def("usable_isas", &usable_isas);
  // For tests: a loop whose task `failing` throws; returns how many tasks ran.
  m.def(
      "fail_in_parallel",
      [](std::int64_t tasks, int threads, std::int64_t failing) {
        const py::gil_scoped_release release;
        std::atomic<std::int64_t> done{0};
        parallel_for(tasks, threads, [&](std::int64_t i, int) {
          if (i == failing) throw std::runtime_error("task " + std::to_string(i) + " failed");
          ++done;
        });
        return done.load();
      },
      py::arg("tasks"), py::arg("threads"), py::arg("failing"));
  m.def("isa", [] { return std::string(kernels().isa); });

  m.def(
      "saved_bytes",
      [](const std::string& dtype, std::int64_t rows, std::int64_t entries) {
        return saved_bytes(dtype_of(dtype), rows, entries);
      },
      py::arg("dtype"), py::arg("rows"), py::arg("entries"));
  m.def("are_decoded", &are_decoded, py::arg("queries"), py::arg("keys"), py::arg("head_dim"));
  py::class_<Work>(m, "Work")
      .def(py::init<>())
      .def_readonly("tiles", &Work::tiles)
      .def_readonly("appended", &Work::appended)
      .def_readonly("tightenings", &Work::tightenings)
      .def_readonly("solved", &Work::solved)
      .def_readonly("steps", &Work::steps)
      .def_readonly("flat_rows", &Work::flat_rows);

  py::class_<Kept>(m, "Kept")
      .def_property_readonly("bytes", &Kept::bytes)
      .def(
          "save", [](Kept& kept, Address to) { kept.save(pointer<void>(to)); }, py::arg("address"),
          py::call_guard<py::gil_scoped_release>());

  const std::array<std::int64_t, 2> everything = {-1, -1};
  m.def(
      "attention_forward",
      [](const std::array<std::int64_t, 7>& dims, const std::string& dtype, double alpha,
         double scale, bool is_causal, const Tensor& query, const Tensor& key, const Tensor& value,
         int threads, const std::string& isa, const Tensor& out, Address tau, bool keep,
         std::int64_t scan_rows, Address support, Address iterations, Address tiles, Work* work,
         const std::array<std::int64_t, 2>& window, std::int64_t shift, double softcap,
         double dropout_p, const Operands& operands,
         const std::optional<BlockTableArgument>& block_table) {
        const Asked asked(dims, dtype, alpha, scale, is_causal, window, shift, softcap, dropout_p,
                          operands);
        ForwardArguments a = {};
        a.pages = block_table_of(block_table);
        a.kernels = &kernels(isa);
        a.problem = asked.problem;
        a.query = tensor_ref(query);
        a.key = tensor_ref(key);
        a.value = tensor_ref(value);
        a.out = tensor_ref(out);
        a.tau = pointer<void>(tau);
        a.keep = keep;
        a.scan_rows = scan_rows;
        a.threads = threads;
        a.support = pointer<std::int32_t>(support);
        a.iterations = pointer<std::int32_t>(iterations);
        a.tiles = pointer<std::uint8_t>(tiles);
        a.work = work;
        const py::gil_scoped_release release;
        return attention_forward(a);
      },
      py::arg("dims"), py::arg("dtype"), py::arg("alpha"), py::arg("scale"), py::arg("is_causal"),
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("threads"), py::arg("isa"),
      py::arg("out"), py::arg("tau"), py::arg("keep"), py::arg("scan_rows"), py::arg("support") = 0,
      py::arg("iterations") = 0, py::arg("tiles") = 0, py::arg("work") = nullptr,
      py::arg("window") = everything, py::arg("shift") = 0, py::arg("softcap") = 0.0,
      py::arg("dropout_p") = 0.0, py::arg("operands") = Operands(),
      py::arg("block_table") = py::none());

  m.def(
      "attention_backward",
      [](const std::array<std::int64_t, 7>& dims, const std::string& dtype, double alpha,
         double scale, bool is_causal, const Tensor& query, const Tensor& key, const Tensor& value,
         int threads, const std::string& isa, const Tensor& grad_out, const Tensor& grad_query,
         const Tensor& grad_key, const Tensor& grad_value, Address saved, std::int64_t saved_bytes,
         const std::array<std::int64_t, 2>& window, std::int64_t shift, double softcap,
         double dropout_p, const Operands& operands, const Operands& gradients) {
        Asked asked(dims, dtype, alpha, scale, is_causal, window, shift, softcap, dropout_p,
                    operands);
        asked.problem.score.is_plain &= gradients.empty();
        BackwardArguments a = {};
        a.kernels = &kernels(isa);
        a.problem = asked.problem;
        a.query = tensor_ref(query);
        a.key = tensor_ref(key);
        a.value = tensor_ref(value);
        a.grad_out = tensor_ref(grad_out);
        a.grad_query = tensor_ref(grad_query);
        a.grad_key = tensor_ref(grad_key);
        a.grad_value = tensor_ref(grad_value);
        const auto of_rows = [&](const char* name) {
          return const_cast<void*>(operand_of(gradients, name).data);
        };
        a.grad_slopes = of_rows("alibi_slopes");
        a.grad_sinks = of_rows("sinks");
        a.grad_scales = of_rows("scales");
        a.grad_alphas = of_rows("alphas");
        a.grad_mask = operand_of(gradients, "attn_mask");
        a.saved = pointer<void>(saved);
        a.saved_bytes = saved_bytes;
        a.threads = threads;
        const py::gil_scoped_release release;
        return attention_backward(a);
      },
      py::arg("dims"), py::arg("dtype"), py::arg("alpha"), py::arg("scale"), py::arg("is_causal"),
      py::arg("query"), py::arg("key"), py::arg("value"), py::arg("threads"), py::arg("isa"),
      py::arg("grad_out"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
      py::arg("saved"), py::arg("saved_bytes"), py::arg("window") = everything,
      py::arg("shift") = 0, py::arg("softcap") = 0.0, py::arg("dropout_p") = 0.0,
      py::arg("operands") = Operands(), py::arg("gradients") = Operands());

  m.def(
      "entmax_forward",
      [](std::int64_t rows, std::int64_t length, const std::string& dtype, double alpha, Address x,
         std::int64_t stride_x, Address y, int threads, const std::string& isa, Address alphas) {
        const EntmaxArguments a = {
            rows,    length,       alpha_of(alpha), pointer<void>(alphas), dtype_of(dtype),
            threads, &kernels(isa)};
        const py::gil_scoped_release release;
        entmax_forward(a, pointer<void>(x), stride_x, pointer<void>(y));
      },
      py::arg("rows"), py::arg("length"), py::arg("dtype"), py::arg("alpha"), py::arg("x"),
      py::arg("stride_x"), py::arg("y"), py::arg("threads"), py::arg("isa"), py::arg("alphas") = 0);

  m.def(
      "entmax_backward",
      [](std::int64_t rows, std::int64_t length, const std::string& dtype, double alpha, Address y,
         Address grad_y, std::int64_t stride_grad_y, Address grad_x, int threads,
         const std::string& isa, Address alphas) {
        const EntmaxArguments a = {
            rows,    length,       alpha_of(alpha), pointer<void>(alphas), dtype_of(dtype),
            threads, &kernels(isa)};
        const py::gil_scoped_release release;
        entmax_backward(a, pointer<void>(y), pointer<void>(grad_y), stride_grad_y,
                        pointer<void>(grad_x));
      },
      py::arg("rows"), py::arg("length"), py::arg("dtype"), py::arg("alpha"), py::arg("y"),
      py::arg("grad_y"), py::arg("stride_grad_y"), py::arg("grad_x"), py::arg("threads"),
      py::arg("isa"), py::arg("alphas") = 0);
}
