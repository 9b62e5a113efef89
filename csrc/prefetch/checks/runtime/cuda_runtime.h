// The part of CUDA's runtime that the engine uses, on streams of the host's: stream 0 is the main
// one, every other the side stream.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../host_streams.h"

using sbp_fast::prefetch::HostStreams;

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };
using cudaStream_t = struct Stream*;
using cudaEvent_t = HostStreams::Event*;
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;

inline HostStreams* host_streams = nullptr;

inline HostStreams::Stream host_stream(cudaStream_t stream) {
  return stream == nullptr ? HostStreams::kMain : HostStreams::kSide;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid device ordinal"; }
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(uintptr_t{1});
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new HostStreams::Event;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  host_streams->mark(host_stream(stream), *event);
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  host_streams->wait(host_stream(stream), *event);
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  host_streams->wait_on_host(*event);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  host_streams->run(host_stream(stream), [=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
