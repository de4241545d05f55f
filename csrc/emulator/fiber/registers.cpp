// Registers that warpgroups pass to each other. All threads of a CTA start with an equal share of
// them, and the warps of a warpgroup must all ask for the same number.
#include "emulator/fiber/registers.h"

#include <algorithm>

#include "emulator/fiber/grid.h"

namespace gk::emulator {
namespace {

constexpr unsigned kRegisters = 65536;  // of a CTA
constexpr unsigned kMost = 256, kGranule = 8, kGroup = 4;  // of a thread; warps of a warpgroup

unsigned at_launch(const Cta& cta) {
    return std::min(kRegisters / cta.threads / kGranule * kGranule, kMost);
}

// The registers that no warp holds, counted for one thread of each warp.
unsigned free_registers(const Cta& cta) {
    unsigned left = at_launch(cta) * unsigned(cta.registers.size());
    for (const unsigned held : cta.registers) left -= held;
    return left;
}

// Lets the warps go on that wait for registers and now find them; the first to ask is served first.
void serve(Cta& cta) {
    while (!cta.claims.empty()) {
        const Claim claim = cta.claims.front();
        unsigned& held = cta.registers[claim.warp];
        if (claim.registers - held > free_registers(cta)) return;
        held = claim.registers;
        cta.claims.erase(cta.claims.begin());
        for (unsigned lane = 0; lane < kWarp; ++lane) wake(*cta.fibers[claim.warp * kWarp + lane]);
    }
}

struct Request {
    const char* what;
    unsigned registers;
    bool gives;
};

std::string wrong(const Request& request, unsigned held) {
    return std::string(request.what) + " to " + std::to_string(request.registers) +
           " registers a thread, of which this warp has " + std::to_string(held);
}

void combine_request(void* const* lanes) {
    const Request& request = *static_cast<const Request*>(lanes[0]);
    Cta& cta = *running->cta;
    const unsigned warp = running->warp();
    if (cta.registers.empty()) {
        cta.registers.assign(cta.warps.size(), at_launch(cta));
        cta.passed.resize(cta.warps.size());
    }
    if (cta.threads < (warp / kGroup + 1) * kGroup * kWarp) {
        fail(std::string(request.what) + " is for whole warpgroups, and the CTA has " +
             std::to_string(cta.threads) + " threads");
    }
    unsigned& held = cta.registers[warp];
    if (request.gives ? request.registers > held : request.registers < held) {
        fail(wrong(request, held));
    }
    cta.passed[warp].push_back(request.registers);
    if (request.gives) {
        held = request.registers;
    } else {
        cta.claims.push_back({warp, request.registers});
    }
    serve(cta);
}

void pass(Request request) {
    need_hopper(request.what);
    collective(request.what, 0xffffffffu, &request, combine_request, true);
    const Cta& cta = *running->cta;
    if (cta.registers[running->warp()] == request.registers) return;
    wait({request.what, path_here()}, [&cta, request] {
        unsigned least = 0;
        for (const unsigned held : cta.registers) least += held;
        return "to " + std::to_string(request.registers) + " registers a thread (all warps hold " +
               std::to_string(least) + " together, and the CTA has " +
               std::to_string(least + free_registers(cta)) + ")";
    });
}

}  // namespace

void warpgroup_reg_alloc(unsigned registers) { pass({"warpgroup_reg_alloc", registers, false}); }

void warpgroup_reg_dealloc(unsigned registers) { pass({"warpgroup_reg_dealloc", registers, true}); }

std::string uneven_registers(const Cta& cta) {
    for (unsigned warp = 0; warp < cta.passed.size(); ++warp) {
        const unsigned first = warp / kGroup * kGroup;
        if (cta.passed[warp] == cta.passed[first]) continue;
        return "warps " + std::to_string(first) + " and " + std::to_string(warp) +
               " of one warpgroup have asked for different registers, or one of them has not asked";
    }
    return "";
}

}  // namespace gk::emulator
