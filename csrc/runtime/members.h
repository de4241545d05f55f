// What the functions of the Python module take. Each params struct has one table of its members:
// their names in Python, their offsets, and how they are set. A table is written
//
//     table(member("q", &Fwd::q), inside(&Fwd::call, kCall), ...)
//
// and `def` exports a launcher with it. Python compares the names with its own.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "runtime/context.h"
#include "runtime/launch.h"

namespace gk {

// The tensors that a kernel reads, the tensors that it writes, and all other members come in this
// order.
enum class Kind { input, output, value };

struct Member {
    const char* name;
    Kind kind;
    size_t offset;
    void (*set)(void* member, pybind11::handle given);
};
using Table = std::vector<Member>;

template <class Value>
constexpr Kind kKind = !std::is_pointer_v<Value>                        ? Kind::value
                       : std::is_const_v<std::remove_pointer_t<Value>> ? Kind::input
                                                                        : Kind::output;

// Pointers come as addresses (0: absent), enumerators as numbers.
template <class Value>
void set(void* member, pybind11::handle given) {
    Value& value = *static_cast<Value*>(member);
    if constexpr (std::is_pointer_v<Value>)
        value = reinterpret_cast<Value>(given.cast<uintptr_t>());
    else if constexpr (std::is_enum_v<Value>)
        value = static_cast<Value>(given.cast<int>());
    else
        value = given.cast<Value>();
}

inline size_t offset_in(const void* all, const void* part) {
    return static_cast<const char*>(part) - static_cast<const char*>(all);
}

template <class Params, class Value>
Table member(const char* name, Value Params::*at) {
    const Params params{};
    return {{name, kKind<Value>, offset_in(&params, &(params.*at)), set<Value>}};
}

inline Table moved(Table members, size_t offset) {
    for (Member& member : members) member.offset += offset;
    return members;
}

// The members of a struct that is itself a member of another struct.
template <class Params, class Inner>
Table inside(Inner Params::*at, const Table& members) {
    const Params params{};
    return moved(members, offset_in(&params, &(params.*at)));
}

// Sorts the members by their kind. Within a kind they stay in the order in which they are given.
template <class... Parts>
Table table(const Parts&... parts) {
    Table all;
    (all.insert(all.end(), parts.begin(), parts.end()), ...);
    std::ranges::stable_sort(all, {}, &Member::kind);
    return all;
}

// The names of the arguments that launchers take besides params and stream.
template <class Value>
constexpr const char* kArgument = nullptr;
template <>
inline constexpr const char* kArgument<DType> = "dtype";
template <>
inline constexpr const char* kArgument<int> = "build";

template <class Value>
Table argument(size_t offset, const Table& params) {
    if constexpr (std::is_same_v<Value, Stream>) {
        return {};
    } else if constexpr (std::is_class_v<Value>) {
        return moved(params, offset);
    } else {
        static_assert(kArgument<Value> != nullptr);
        return {{kArgument<Value>, Kind::value, offset, set<Value>}};
    }
}

// Exports a launcher. The Python function takes the device and the stream, then all fields by
// position; module.fields[name] has the names of the fields.
template <class Result, class... Taken>
void def(pybind11::module_& module, const char* name, const Table& params,
         Result (*launch)(Taken...)) {
    using All = std::tuple<std::remove_cvref_t<Taken>...>;
    const All none{};
    const Table fields = std::apply(
        [&](const auto&... taken) {
            return table(argument<std::remove_cvref_t<Taken>>(offset_in(&none, &taken), params)...);
        },
        none);
    pybind11::list names;
    for (const Member& field : fields) names.append(field.name);
    module.attr("fields")[name] = pybind11::tuple(names);
    module.def(name, [=](int device, uintptr_t stream, const pybind11::args& given) {
        if (given.size() != fields.size())
            throw pybind11::type_error(std::string(name) + " takes " +
                                       std::to_string(fields.size()) + " fields, got " +
                                       std::to_string(given.size()));
        All all{};
        std::get<Stream>(all) = {device, reinterpret_cast<cudaStream_t>(stream)};
        for (size_t i = 0; i < fields.size(); ++i) {
            try {
                fields[i].set(reinterpret_cast<char*>(&all) + fields[i].offset, given[i]);
            } catch (const pybind11::cast_error&) {
                throw pybind11::type_error(std::string(name) + " cannot take " +
                                           std::string(pybind11::repr(given[i])) + " as " +
                                           fields[i].name);
            }
        }
        const Context context(device);
        return std::apply(launch, all);
    });
}

}  // namespace gk
