#include "cpu/dispatch.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gk::cpu {

#if defined(__x86_64__)
namespace baseline {
extern const Kernels kernels;
}
namespace v3 {
extern const Kernels kernels;
}
namespace v4 {
extern const Kernels kernels;
}
namespace v4_bf16 {
extern const Kernels kernels;
}
// csrc/cpu/amx: what tiles compute. All else is v4_bf16's.
namespace v4_amx {
void attention_fwd(const AttentionFwd& p, const AttentionItem& item, void* scratch);
void attention_bwd(const AttentionBwd& p, const BackwardItem& item, void* scratch);
void attention_mask_bwd(const AttentionBwd& p, const MaskItem& item, void* scratch);
int64_t attention_fwd_scratch(const AttentionFwd& p);
int64_t attention_bwd_scratch(const AttentionBwd& p);
int64_t linear_scratch(const Linear& p);
void linear_ready(const Linear& p, void* x);
void linear(const Linear& p, const void* x, int64_t first, int64_t last);
}  // namespace v4_amx
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
    const Kernels* kernels;
    bool here;
};

#if defined(__x86_64__)

// The features that scripts/cpu_extension.py lets the compiler use, as CPUID numbers them.
struct Features {
    unsigned a = 0, b = 0, c = 0, d = 0;

    Features(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

constexpr bool has(unsigned found, std::initializer_list<int> bits) {
    for (int bit : bits)
        if ((found >> bit & 1) == 0) return false;
    return true;
}

// Which registers the operating system saves.
unsigned saved_registers() {
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// Linux saves the tiles of a process that has asked for it, once and for good.
bool tiles_allowed() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    return allowed;
#else
    return false;
#endif
}

// Made here, in code for any CPU.
const Kernels& with_tiles() {
    static const Kernels found = [] {
        Kernels kernels = v4_bf16::kernels;
        kernels.isa = "v4_amx";
        kernels.attention_fwd = v4_amx::attention_fwd;
        kernels.attention_bwd = v4_amx::attention_bwd;
        kernels.attention_mask_bwd = v4_amx::attention_mask_bwd;
        kernels.attention_fwd_scratch = v4_amx::attention_fwd_scratch;
        kernels.attention_bwd_scratch = v4_amx::attention_bwd_scratch;
        kernels.linear_scratch = v4_amx::linear_scratch;
        kernels.linear_ready = v4_amx::linear_ready;
        kernels.linear = v4_amx::linear;
        return kernels;
    }();
    return found;
}

std::vector<Level> levels() {
    const Features one(1, 0), seven(7, 0), more(7, 1), extended(0x80000001, 0);
    const unsigned saved = has(one.c, {27}) ? saved_registers() : 0;  // OSXSAVE
    // x86-64-v3: FMA, MOVBE, AVX, F16C; BMI1, AVX2, BMI2; LZCNT.
    const bool v3 = has(one.c, {12, 22, 28, 29}) && has(seven.b, {3, 5, 8}) &&
                    has(extended.c, {5}) && has(saved, {1, 2});
    // x86-64-v4: AVX-512 F, DQ, CD, BW, VL.
    const bool v4 = v3 && has(seven.b, {16, 17, 28, 30, 31}) && has(saved, {5, 6, 7});
    const bool v4_bf16 = v4 && has(more.a, {5});  // AVX512-BF16
    // AMX-BF16, AMX-TILE; the tiles' two parts of the saved registers.
    const bool amx = v4_bf16 && has(seven.d, {22, 24}) && has(saved, {17, 18}) && tiles_allowed();
    return {{&baseline::kernels, true},
            {&v3::kernels, v3},
            {&v4::kernels, v4},
            {&v4_bf16::kernels, v4_bf16},
            {&with_tiles(), amx}};
}

#else

std::vector<Level> levels() { return {{&baseline::kernels, true}}; }

#endif

const Kernels* highest() {
    const Kernels* found = nullptr;
    for (const Level& level : levels())
        if (level.here) found = level.kernels;
    return found;
}

const Kernels* chosen = highest();
thread_local const Kernels* preferred = nullptr;

const Kernels* named(const std::string& isa) {
    std::string here;
    for (const Level& level : levels()) {
        if (level.here && isa == level.kernels->isa) return level.kernels;
        if (level.here) here += (here.empty() ? "" : ", ") + std::string(level.kernels->isa);
    }
    throw std::invalid_argument("the CPU kernels run here with the instruction sets " + here +
                                ", not with " + isa);
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Level& level : levels())
        if (level.here) names.emplace_back(level.kernels->isa);
    return names;
}

const Kernels& kernels() { return preferred == nullptr ? *chosen : *preferred; }

void use(const std::string& isa) { chosen = named(isa); }

void prefer(const std::string& isa) { preferred = isa.empty() ? nullptr : named(isa); }

}  // namespace gk::cpu
