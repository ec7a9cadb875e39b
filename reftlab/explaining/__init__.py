"""What edits read, write and cause, alone and together, and how far one may trust what is said of them."""

from reftlab.explaining.causes.direct import direct_effect
from reftlab.explaining.causes.dose import DoseCurve, DoseResponse, dose_response
from reftlab.explaining.causes.interchange import interchange_accuracy
from reftlab.explaining.causes.interchanged import InterchangeAccuracy
from reftlab.explaining.causes.leave_one_out import LeaveOneOut, leave_one_out
from reftlab.explaining.causes.mediated import Mediation
from reftlab.explaining.causes.mediation import mediate
from reftlab.explaining.causes.removal import Removal, Removed
from reftlab.explaining.causes.shapley import ShapleyValues, shapley
from reftlab.explaining.causes.split import DirectEffect, DirectEffects
from reftlab.explaining.composition.composition import Composition, composition
from reftlab.explaining.composition.interference import EditPair, Interference, SharedPlace, interference
from reftlab.explaining.evidence.faithfulness import Faithfulness, faithfulness
from reftlab.explaining.evidence.replies import Reply, ReplyTable
from reftlab.explaining.explain import explain
from reftlab.explaining.explanation import EditExplanation, Explanation
from reftlab.explaining.geometry.angles import SubspaceAngles, subspace_angles
from reftlab.explaining.geometry.contexts import Contexts
from reftlab.explaining.geometry.directions import Directions, find_directions
from reftlab.explaining.geometry.driving import driving_contexts
from reftlab.explaining.geometry.edit_angles import EditAngles, edit_angles
from reftlab.explaining.geometry.edit_tokens import promoted_tokens
from reftlab.explaining.geometry.lens import DataLens
from reftlab.explaining.geometry.lens_fit import fit_lens
from reftlab.explaining.geometry.tokens import TokenEffect, TokenEffects, readable_token
from reftlab.explaining.geometry.vectors import CommonAxes, EditVectors, Sizes
from reftlab.explaining.section import Section

__all__ = [
    "CommonAxes",
    "Composition",
    "Contexts",
    "DataLens",
    "DirectEffect",
    "DirectEffects",
    "Directions",
    "DoseCurve",
    "DoseResponse",
    "EditAngles",
    "EditExplanation",
    "EditPair",
    "EditVectors",
    "Explanation",
    "Faithfulness",
    "InterchangeAccuracy",
    "Interference",
    "LeaveOneOut",
    "Mediation",
    "Removal",
    "Removed",
    "Reply",
    "ReplyTable",
    "Section",
    "ShapleyValues",
    "SharedPlace",
    "Sizes",
    "SubspaceAngles",
    "TokenEffect",
    "TokenEffects",
    "composition",
    "direct_effect",
    "dose_response",
    "driving_contexts",
    "edit_angles",
    "explain",
    "faithfulness",
    "find_directions",
    "fit_lens",
    "interchange_accuracy",
    "interference",
    "leave_one_out",
    "mediate",
    "promoted_tokens",
    "readable_token",
    "shapley",
    "subspace_angles",
]
