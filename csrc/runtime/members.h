// Tables of what structs hold, for the boundary to Python: each member's name there, and where it is.
// A table is written once, as `table(member("q", &Fwd::q), inside(&Fwd::call, kCall), ...)`; what a
// function takes, how a struct is filled and the names that Python compares follow from it.
#pragma once

#include <functional>
#include <tuple>
#include <type_traits>

namespace gk {

// std::invoke(reach, params) is a reference to the member.
template <class Reach>
struct Member {
    const char* name;
    Reach reach;
};

template <class Params, class Reach>
using ValueOf = std::remove_reference_t<std::invoke_result_t<Reach, Params&>>;

constexpr auto member(const char* name, auto reach) {
    return std::tuple{Member{name, reach}};
}

// The members of a struct that is itself a member.
constexpr auto inside(auto outer, const auto& table) {
    const auto from_outside = [outer](const auto& inner) {
        return Member{inner.name, [outer, reach = inner.reach](auto& params) -> auto& {
                          return std::invoke(reach, std::invoke(outer, params));
                      }};
    };
    return std::apply([&](const auto&... inner) { return std::tuple{from_outside(inner)...}; },
                      table);
}

constexpr auto table(const auto&... parts) { return std::tuple_cat(parts...); }

// Python tells apart the tensors that a kernel reads, those that it writes, and everything else.
enum class Kind { input, output, value };

template <class Value>
constexpr Kind kKind = !std::is_pointer_v<Value>                        ? Kind::value
                       : std::is_const_v<std::remove_pointer_t<Value>> ? Kind::input
                                                                        : Kind::output;

template <class Params, Kind kind>
constexpr auto only(const auto& table) {
    const auto kept = []<class Reach>(const Member<Reach>& member) {
        if constexpr (kKind<ValueOf<Params, Reach>> == kind)
            return std::tuple{member};
        else
            return std::tuple{};
    };
    return std::apply([&](const auto&... members) { return std::tuple_cat(kept(members)...); },
                      table);
}

// Inputs, outputs, values; each of them in the table's order.
template <class Params>
constexpr auto in_order(const auto& table) {
    return std::tuple_cat(only<Params, Kind::input>(table), only<Params, Kind::output>(table),
                          only<Params, Kind::value>(table));
}

}  // namespace gk
