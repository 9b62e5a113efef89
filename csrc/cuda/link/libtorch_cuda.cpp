// Linked in place of torch's own libtorch_cuda.so, which a CPU build of torch does not have. Only
// its name and this one symbol matter: the library that is linked with it asks for
// libtorch_cuda.so, and where it is loaded that is the real one, already in the process by `import
// torch`.
extern "C" void aoti_torch_get_current_cuda_stream() {}
