// Source lines come from addr2line, which knows inlined functions too; callers are found by frame
// pointers.
#include "emulator/memory/report.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "emulator/fiber/grid.h"

// The linker defines this symbol at the module's first byte.
extern "C" const char __ehdr_start __attribute__((visibility("hidden")));

namespace gk::emulator {
namespace {

constexpr size_t kMostCallers = 24;

std::string quoted(const std::string& text) {
    std::string result = "'";
    for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return result + "'";
}

std::string hexadecimal(uintptr_t number) {
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "0x%zx", size_t(number));
    return buffer;
}

// The return addresses of a thread's calls, from a frame outwards. Each frame begins with the
// caller's frame and the return address. The last two addresses belong to the kernel's caller and
// to the thread's first function, which has no caller.
Calls calls_from(const Thread& thread, const char* frame) {
    Calls calls;
    const char* stack = thread.fiber.stack_begin();
    const size_t size = size_t(thread.fiber.stack_end() - stack);
    while (size_t(frame - stack) <= size - 2 * sizeof(void*) && calls.size() < kMostCallers) {
        const void* values[2];
        std::memcpy(values, frame, sizeof values);
        if (values[0] == nullptr && calls.size() > 2) calls.resize(calls.size() - 2);
        if (static_cast<const char*>(values[0]) <= frame) break;
        calls.push_back(values[1]);
        frame = static_cast<const char*>(values[0]);
    }
    return calls;
}

}  // namespace

std::string lines(const Calls& calls) {
    Dl_info module;
    if (calls.empty() || !dladdr(&__ehdr_start, &module)) return "an unknown place";
    std::string command = "addr2line -a -i -e " + quoted(module.dli_fname);
    for (const void* call : calls) {
        // A return address may already belong to the next line; one byte before it is still the
        // call.
        command += " " + hexadecimal(uintptr_t(call) - uintptr_t(&__ehdr_start) - 1);
    }
    std::string found, frame;  // frame: one call, with the functions inlined into it
    const auto end_frame = [&] {
        found += (found.empty() || frame.empty() ? "" : ", called at ") + frame;
        frame.clear();
    };
    if (FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r")) {
        char line[4096];
        while (std::fgets(line, sizeof line, pipe)) {
            std::string text = short_path(line);
            text = text.substr(0, text.find_first_of(" \n"));
            const bool known = text.find('?') == std::string::npos;
            if (text.rfind("0x", 0) == 0) {
                end_frame();
            } else if (text.rfind("csrc/emulator/", 0) == 0) {
                // A header's function may be inlined into a kernel; a .cpp file is the emulator
                // itself.
                if (text.find(".cpp:") != std::string::npos) frame.clear();
            } else if (known) {
                frame += (frame.empty() ? "" : ", called at ") + text;
            }
        }
        pclose(pipe);
        end_frame();
    }
    return found.empty() ? "code address " + hexadecimal(uintptr_t(calls[0])) : found;
}

std::string here() {
    if (running == nullptr) return "the host";
    return lines(calls_from(*running, static_cast<const char*>(__builtin_frame_address(0))));
}

uint64_t path_here() {
    const char* frame = static_cast<const char*>(__builtin_frame_address(0));
    uint64_t path = 0;
    while (frame != nullptr) {
        const void* values[2];
        std::memcpy(values, frame, sizeof values);
        path = (path ^ uintptr_t(values[1])) * 0x9e3779b97f4a7c15u;
        path ^= path >> 32;
        frame = static_cast<const char*>(values[0]);
    }
    return path;
}

Calls calls_of(const Thread& waiting) { return calls_from(waiting, waiting.fiber.frame()); }

std::string short_path(const std::string& path) {
    size_t start = path.rfind("/csrc/");
    if (start == std::string::npos) start = path.rfind("/tests/");
    return start == std::string::npos ? path : path.substr(start + 1);
}

unsigned pack_place(const void* pc) {
    return unsigned(uintptr_t(pc) - uintptr_t(&__ehdr_start)) & ((1u << 28) - 1);
}

const void* unpack_place(unsigned place) { return &__ehdr_start + place; }

}  // namespace gk::emulator
