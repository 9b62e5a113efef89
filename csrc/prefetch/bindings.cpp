// The ring as a Python module. Whatever may wait, waits without the GIL; the ring's thread never
// takes it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host_engine.h"
#include "ring.h"

namespace py = pybind11;
using namespace sbp_fast::prefetch;

namespace {

char* pointer(uintptr_t address) { return reinterpret_cast<char*>(address); }

// The end of a ring waits for its thread.
struct EndWithoutGil {
  void operator()(Ring* ring) const {
    py::gil_scoped_release release;
    delete ring;
  }
};

Piece make_piece(uintptr_t first, int64_t length, int64_t stride, uintptr_t index, int64_t count,
                 const std::vector<std::pair<int64_t, int64_t>>& inner, int64_t run,
                 uintptr_t gathered, uintptr_t device) {
  Piece piece;
  piece.rows = {pointer(first), length, stride, reinterpret_cast<const int64_t*>(index),
                count,          {},     run};
  for (const auto& [dimension, step] : inner) piece.rows.inner.push_back({dimension, step});
  piece.gathered = pointer(gathered);
  piece.device = pointer(device);
  return piece;
}

// By the address of a function that makes one, which another library has.
std::shared_ptr<Engine> make_engine(uintptr_t function, int device) {
  return std::shared_ptr<Engine>(reinterpret_cast<Engine* (*)(int)>(function)(device));
}

}  // namespace

PYBIND11_MODULE(prefetch, module) {
  using WithoutGil = py::call_guard<py::gil_scoped_release>;
  module.doc() = "A thread that prepares the next micro-batch.";
  module.attr("SLOTS") = Ring::kSlots;

  py::class_<Piece>(module, "Piece")
      .def(py::init(&make_piece), py::kw_only(), py::arg("first"), py::arg("length"),
           py::arg("stride"), py::arg("index"), py::arg("count"), py::arg("inner"), py::arg("run"),
           py::arg("gathered"), py::arg("device"));

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine");
  module.def("make_engine", &make_engine, py::arg("function"), py::arg("device"));

  py::class_<HostEngine, Engine, std::shared_ptr<HostEngine>>(module, "HostEngine")
      .def(py::init([](const std::string& slow) {
             if (slow != "main" && slow != "side") {
               throw py::value_error("slow is '" + slow + "'; it must be 'main' or 'side'");
             }
             return std::make_shared<HostEngine>(slow == "main" ? HostStreams::kMain
                                                                : HostStreams::kSide);
           }),
           py::arg("slow"))
      .def(
          "read",
          [](HostEngine& engine, uintptr_t result, uintptr_t device, int64_t bytes) {
            // Computes: reads device memory when the main stream's turn comes.
            engine.streams().run(HostStreams::kMain, [=] {
              std::memcpy(pointer(result), pointer(device), static_cast<size_t>(bytes));
            });
          },
          py::arg("result"), py::arg("device"), py::arg("bytes"))
      .def("synchronize", [](HostEngine& engine) { engine.streams().synchronize(); });

  py::class_<Ring, std::unique_ptr<Ring, EndWithoutGil>>(module, "Ring")
      .def(py::init([](std::shared_ptr<Engine> engine) {
             return std::unique_ptr<Ring, EndWithoutGil>(new Ring(std::move(engine)));
           }),
           py::arg("engine"))
      .def("submit", &Ring::submit, py::arg("pieces"), py::arg("main"), WithoutGil())
      .def("receive", &Ring::receive, py::arg("ticket"), py::arg("main"), WithoutGil())
      .def("finish_reading", &Ring::finish_reading, WithoutGil())
      .def("join", &Ring::join, py::arg("main"), WithoutGil());
}
