#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include "slots.h"

namespace gsscale {

void bind_slots(nb::module_ &m) {
    nb::class_<SlotTable>(m, "SlotTable",
                          "Which rows are in the slots of a cache, and which leave it first: those "
                          "that are needed last. Calls must come from one thread at a time.")
        .def(nb::init<int64_t, int64_t>(), nb::arg("n_slots"), nb::arg("n_rows"))
        .def_prop_ro("n_slots", &SlotTable::n_slots)
        .def_prop_ro("n_rows", &SlotTable::n_rows)
        .def_prop_ro("in_use", &SlotTable::in_use, "Slots that hold a row.")
        .def("expect", &SlotTable::expect, nb::arg("ids").noconvert(), nb::arg("view"),
             "Note that view number `view`, at most 30 after the last one, will need the rows "
             "`ids` (ascending).")
        .def("plan", &SlotTable::plan, nb::arg("ids").noconvert(), nb::arg("view"),
             nb::arg("protect_from"), nb::arg("slots").noconvert(), nb::arg("moves").noconvert(),
             "Give each row of `ids` (ascending) a slot, slots[i], for view number `view`, higher "
             "than any before. moves[k] = (row, slot, row that leaves it) tells of the k-th row "
             "that was not resident, in ascending order of the rows; the row that leaves is "
             "-1 where it was empty. Rows leave block by block, 64 rows by 64: those that no view "
             "is known to need first, those used longest ago before others; then those needed "
             "last. Of equals the lower row leaves. Rows of `ids` or used by a view >= "
             "protect_from, which never goes back, stay, and others of their blocks leave last. "
             "Returns the number of rows that were not resident and the newest view that used any "
             "of those that leave, or -1; or None, and changes nothing, if the rows do not fit.")
        .def("lookup", &SlotTable::lookup, nb::arg("ids").noconvert(), nb::arg("slots").noconvert(),
             "Slots of the rows `ids` (ascending), -1 where not resident; returns the number of "
             "those that are. This is not a use.")
        .def("residents", &SlotTable::residents, nb::arg("rows").noconvert(),
             nb::arg("slots").noconvert(),
             "All resident rows, ascending, and their slots; returns how many they are.")
        .def("drop", &SlotTable::drop, nb::arg("ids").noconvert(),
             "Rows that are gone, or whose slots no longer hold what the host store has: free their "
             "slots. What is expected of their ids stays.")
        .def("rename", &SlotTable::rename, nb::arg("ids").noconvert(), nb::arg("to").noconvert(),
             "Row ids[i] is now row to[i], which was not resident. Its slot stays.")
        .def("expect_like", &SlotTable::expect_like, nb::arg("ids").noconvert(),
             nb::arg("rows").noconvert(),
             "The views that are expected to need row ids[i] will need row rows[i], too.")
        .def("permute", &SlotTable::permute, nb::arg("order").noconvert(),
             "Row order[i] is now row i; slots stay.")
        .def("resize", &SlotTable::resize, nb::arg("n_slots"), nb::arg("n_rows"),
             "Add slots, and rows behind the last one, or take such away that are not resident.")
        .def("clear", &SlotTable::clear, nb::arg("n_rows").none() = nb::none(),
             "Empty all slots; optionally, set a new number of rows.");
}

}  // namespace gsscale
